"""What users of Kvasir import; `kvasir.program` is a language for programs of calls to a model."""
