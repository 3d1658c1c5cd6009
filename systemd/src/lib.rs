//! rcr and systemd: tags, units, what crosses the jump, adoption.

pub mod handover;
