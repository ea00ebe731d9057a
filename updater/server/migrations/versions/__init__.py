"""Schema migrations, newest last."""
