"""Judges of a crash state, one a module, from cheap to dear.

| judge | asks | costs |
|---|---|---|
| `static` | the boot contract's pure functions over a class's facts | microseconds |
| `data` | e2fsck and the synced files, once for each distinct data partition | 7 ms |
| `mount` | a real kernel: the device's repair, mount, the same files | 0.6 s |
| `uboot` | the real bootloader, up to its decision | 0.4 s |
| `coldboot` | the whole device, up to its ready line | 2 s |

Each dearer judge also checks the cheaper ones: where a boot and the static oracle, or a mount and
the data judge, disagree, one of the two is wrong about the device, and the exploration fails.
"""
