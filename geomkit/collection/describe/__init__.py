"""What a collection will hold and how much memory it needs: ``describe`` makes a ``description`` from ``memory``."""
