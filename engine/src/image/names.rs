//! How image files are called.

#![allow(missing_docs)]

pub const INVENTORY: &str = "inventory.img";
pub const PSTREE: &str = "pstree.img";
pub const FILES: &str = "files.img";
pub const PIPES_DATA: &str = "pipes-data.img";
pub const FIFO_DATA: &str = "fifo-data.img";
pub const TTY_INFO: &str = "tty-info.img";
pub const TTY_DATA: &str = "tty-data.img";
pub const SK_QUEUES: &str = "sk-queues.img";
pub const BPFMAP_DATA: &str = "bpfmap-data.img";
pub const MEMFD: &str = "memfd.img";
pub const REMAP_FPATH: &str = "remap-fpath.img";
pub const SECCOMP: &str = "seccomp.img";
pub const CGROUP: &str = "cgroup.img";
pub const FILE_LOCKS: &str = "filelocks.img";
pub const TIMENS: &str = "timens-0.img";
pub const STATS_DUMP: &str = "stats-dump";
pub const STATS_RESTORE: &str = "stats-restore";
/// Our own additions to `files.img`.
pub const RCR_FILES: &str = "rcr-files.img";

pub fn core(tid: i32) -> String {
    format!("core-{tid}.img")
}
pub fn ids(pid: i32) -> String {
    format!("ids-{pid}.img")
}
pub fn mm(pid: i32) -> String {
    format!("mm-{pid}.img")
}
pub fn fs(pid: i32) -> String {
    format!("fs-{pid}.img")
}
pub fn pagemap(pid: i32) -> String {
    format!("pagemap-{pid}.img")
}
pub fn pagemap_shmem(shmid: u64) -> String {
    format!("pagemap-shmem-{shmid}.img")
}
pub fn pages(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}
pub fn fdinfo(files_id: u32) -> String {
    format!("fdinfo-{files_id}.img")
}
pub fn ghost_file(id: u32) -> String {
    format!("ghost-file-{id:x}.img")
}
pub fn tcp_stream(ino: u32) -> String {
    format!("tcp-stream-{ino:x}.img")
}
pub fn mountpoints(ns_id: u32) -> String {
    format!("mountpoints-{ns_id}.img")
}
pub fn utsns(ns_id: u32) -> String {
    format!("utsns-{ns_id}.img")
}
pub fn netns(ns_id: u32) -> String {
    format!("netns-{ns_id}.img")
}
pub fn userns(ns_id: u32) -> String {
    format!("userns-{ns_id}.img")
}
pub fn pidns(ns_id: u32) -> String {
    format!("pidns-{ns_id}.img")
}
