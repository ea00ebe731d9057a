"""The simulated device: the updater's real code on a drive, a boot loader and a clock in memory.

`drive` is the medium with its volatile cache, `filesystem` the data partition on it, `database`
lets SQLite run there, `bootloader` keeps the boot contract on the environment's real bytes,
`managed` has the daemon and the server that it asks, and `device` plugs all of them into the
client's ports. Nothing here sleeps, opens a socket or starts a
process; every choice comes from a seed.
"""
