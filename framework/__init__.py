"""The framework that cuts power and network under an updater, and judges how it comes back."""
