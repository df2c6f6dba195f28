"""Times and memory, as ratios measured side by side in one run; pytest collects nothing here."""
