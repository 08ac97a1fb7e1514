"""What is carried: fixes, releases and patches, as the tables and patch files say it; hunks in memory."""
