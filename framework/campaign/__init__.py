"""Many runs at once: simulated lifetimes, seeded searches, shrinking."""
