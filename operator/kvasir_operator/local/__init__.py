"""`kvasir up`: an InferenceService's rendered pods as processes of this machine."""
