"""Farm runs: many scenarios on many boards, which labgrid's coordinator lends.

The scenarios run through pytest-xdist, one worker a place. Each worker process takes its own place
(`tenure`), has it checked, and hands it back; the controller decides what runs next (`queue`), and
hands back what a worker that was killed still held. What was seen of each board is kept
(`history`). Nothing here knows a power switch or a console: that is the rig's affair.
"""
