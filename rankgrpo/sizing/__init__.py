"""Memory and seconds of a run by arithmetic, before anything is loaded."""
