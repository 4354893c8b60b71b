//! Connections: TLS, first header, page streams, deadlines.
