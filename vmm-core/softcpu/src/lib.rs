//! An x86-64 CPU in software: interpreter, MMU and bus trait.
