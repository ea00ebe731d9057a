"""Recipes and builder for the targets' bootloaders, kernels, root file systems and disks."""
