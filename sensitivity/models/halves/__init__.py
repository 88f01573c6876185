"""What runtimes that execute a model in two halves must know of its type: its image half, and its tokens' positions."""
