"""The commands, by what they are for; each reads its options, calls the part that does the work, shows the result."""
