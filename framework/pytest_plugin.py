"""The pytest plugin: the fixtures `device`, `update` and `faults`, and the results they leave."""
