//! Tests on real kernels: a QEMU harness, the agent inside the guest, and what
//! looks at the services from outside.
//!
//! ```text
//!  xtask ──> scenarios ──> vm::Vm ──> qemu::Machine   (one QEMU process)
//!                            ├─────> agent::Agent     (virtio-serial ⇄ rcr-agent)
//!                            └─────> qmp::Qmp         (snapshots, quit)
//! ```

pub mod vm;
pub mod wire;
