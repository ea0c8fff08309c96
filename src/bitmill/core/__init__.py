"""The nouns of bitmill: errors, frozen records, the five abstract axes, and discovery by file name."""
