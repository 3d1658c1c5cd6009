//! The programs `rcr-upgrade` and `rcr`: order, messages, progress.

pub mod carrier;
pub mod criu;
mod environment;
pub mod exit;
pub mod progress;
mod service;
mod signals;
pub mod status;
pub mod sys;
pub mod tagging;
pub mod tree;
pub mod upgrade;

/// Sends the libraries' log to standard error; `RUST_LOG` chooses what.
pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .init();
}
