//! The suite that every backend has to pass: cells and what has to come of them, as data.
