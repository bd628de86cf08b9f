"""What a run will cost and reach, before it runs."""
