"""What a method returns: codes and what turns them into numbers again."""
