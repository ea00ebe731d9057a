"""The framework that cuts power and network under an updater, and proves that the device returns."""
