"""One self-contained HTML page about one run, a whole pipeline, or several side by side (`align report`)."""
