"""What every room uses: errors in one line, files that appear whole, the console, the process."""
