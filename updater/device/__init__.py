"""The on-device client. Modules are imported where they are used: see `updater.cli`."""
