"""The storage of a study's trials: a journal file in the study's folder, or a database."""
