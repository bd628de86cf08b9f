"""The gate: the metric regression check, and its verdict in the formats that people and machines read."""
