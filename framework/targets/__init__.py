"""Targets: labgrid drivers, protocols and strategies of ours.

`RecordedQEMUDriver` (qemu.py) is a machine whose power can really be cut; `SlotStrategy`
(strategy.py) brings an A/B device to a state from wherever a cut left it; `load_rig` (rig.py)
reads a rig file strictly. Import the modules; nothing is imported here, because each registers
its drivers with labgrid.
"""
