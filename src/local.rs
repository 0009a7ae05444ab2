//! Sessions in processes of this host, without isolation.
