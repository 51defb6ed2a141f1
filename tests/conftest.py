"""What all tests share: where the project's files are, and real data read once a session."""
