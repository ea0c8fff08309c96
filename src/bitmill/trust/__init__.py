"""What can be said of a model file before anybody trusts it: sound, safe, and loadable by whom."""
