"""Plan to program to Python source."""
