//! Round trips, golden files, and what the header and the bounds refuse.
