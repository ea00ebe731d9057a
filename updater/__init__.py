"""The A/B updater: artifact format, device client, management server, gateway."""
