//! What fuzzing starts from: small real ones of everything.

use std::fs;
use std::path::Path;

use rcr_engine::ext::{self, RcrInventory, RcrTask, RcrThread};
use rcr_engine::image::schema::{
    CoreEntry, CredsEntry, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, MmEntry, PagemapEntry,
    PagemapHead, PipeDataEntry, PstreeEntry, SeccompEntry, SkPacketEntry, TaskCoreEntry,
    TaskKobjIdsEntry, ThreadCoreEntry, ThreadInfoX86, TimensEntry, VmaEntry,
};
use rcr_engine::image::{ImageWriter, Kind, write_image};
use rcr_pmem_store::Writer;

use crate::Images;

/// With the directory of a corpus in `RCR_FUZZ_SEEDS`, writes the target's
/// seeds there and ends the program.
pub fn write_if_asked(target: &str) {
    let Some(dir) = std::env::var_os("RCR_FUZZ_SEEDS") else {
        return;
    };
    let dir = Path::new(&dir);
    for (n, seed) in of(target).iter().enumerate() {
        fs::write(dir.join(format!("seed-{n}")), seed).expect("the corpus can be written");
    }
    std::process::exit(0);
}

fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "images" => {
            let image = |row: (&str, Vec<u8>)| [vec![0, 0], row.1].concat();
            dump().into_iter().map(image).collect()
        }
        "verify" => vec![row(dump()), row(foreign(dump()))],
        "pages" => vec![row(dump()), row(contents())],
        "proc" => proc(),
        "netlink" => vec![netlink()],
        "vdso" => fs::read("/proc/self/maps")
            .map(|_| own_vdso())
            .into_iter()
            .collect(),
        "store" => vec![store()],
        "handover" => Vec::new(),
        _ => vec![cpio()],
    }
}

fn row(images: Vec<(&str, Vec<u8>)>) -> Vec<u8> {
    let mut row = Vec::new();
    for (name, bytes) in images {
        Images::put(&mut row, name, &bytes);
    }
    row
}

/// A dump of one process with a page and a file, its pid 2.
fn dump() -> Vec<(&'static str, Vec<u8>)> {
    let core = CoreEntry {
        tc: Some(TaskCoreEntry::default()),
        thread_core: Some(ThreadCoreEntry {
            creds: Some(CredsEntry::default()),
            ..ThreadCoreEntry::default()
        }),
        thread_info: Some(ThreadInfoX86::default()),
        ..CoreEntry::default()
    };
    let leader = PstreeEntry {
        pid: 2,
        ppid: 1,
        pgid: 2,
        sid: 2,
        threads: vec![2],
    };
    let inventory = InventoryEntry {
        img_version: 2,
        ..InventoryEntry::default()
    };
    let own = RcrInventory {
        version: ext::VERSION,
        ..RcrInventory::default()
    };
    let vma = VmaEntry {
        start: 0x1000,
        end: 0x3000,
        prot: 3,
        status: 1,
        ..VmaEntry::default()
    };
    let mm = MmEntry {
        vmas: vec![vma],
        ..MmEntry::default()
    };
    let mut pagemap = ImageWriter::new(Kind::Pagemap);
    pagemap.record(&PagemapHead { pages_id: 1 });
    pagemap.record(&PagemapEntry {
        vaddr: 0x1000,
        nr_pages: Some(1),
        flags: Some(4),
        ..PagemapEntry::default()
    });
    vec![
        ("inventory.img", write_image(Kind::Inventory, &[inventory])),
        ("rcr-inventory.img", write_image(Kind::RcrTasks, &[own])),
        (
            "seccomp.img",
            write_image(Kind::Seccomp, &[SeccompEntry::default()]),
        ),
        ("pstree.img", write_image(Kind::Pstree, &[leader])),
        ("core-2.img", write_image(Kind::Core, &[core])),
        (
            "rcr-task-2.img",
            write_image(Kind::RcrTasks, &[RcrTask::default()]),
        ),
        (
            "rcr-thread-2.img",
            write_image(Kind::RcrTasks, &[RcrThread::default()]),
        ),
        (
            "ids-2.img",
            write_image(Kind::Ids, &[TaskKobjIdsEntry::default()]),
        ),
        ("mm-2.img", write_image(Kind::Mm, &[mm])),
        ("fs-2.img", write_image(Kind::Fs, &[FsEntry::default()])),
        (
            "fdinfo-0.img",
            write_image(Kind::Fdinfo, &[FdinfoEntry::default()]),
        ),
        (
            "files.img",
            write_image(Kind::Files, &[FileEntry::default()]),
        ),
        ("pagemap-2.img", pagemap.finish()),
        ("pages-1.img", vec![7; 4096]),
    ]
}

/// As somebody else's program would have written it.
fn foreign(mut dump: Vec<(&'static str, Vec<u8>)>) -> Vec<(&'static str, Vec<u8>)> {
    dump.retain(|(name, _)| !name.starts_with("rcr-"));
    let clocks = write_image(Kind::Timens, &[TimensEntry::default()]);
    dump.push(("timens-0.img", clocks));
    dump
}

/// Images with content between their records.
fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let mut pipes = ImageWriter::new(Kind::PipesData);
    let head = PipeDataEntry {
        pipe_id: 1,
        bytes: 3,
        size: None,
    };
    pipes.record(&head).payload(b"abc");
    let mut queue = ImageWriter::new(Kind::SkQueues);
    let packet = SkPacketEntry {
        length: 3,
        ..SkPacketEntry::default()
    };
    queue.record(&packet).payload(b"abc");
    vec![
        ("pipes-data.img", pipes.finish()),
        ("sk-queues.img", queue.finish()),
        ("ipcns-msg-1.img", ImageWriter::new(Kind::IpcMsg).finish()),
        ("ipcns-shm-1.img", ImageWriter::new(Kind::IpcShm).finish()),
        ("ipcns-sem-1.img", ImageWriter::new(Kind::IpcSem).finish()),
    ]
}

/// This process's files, each behind the number of its parser.
fn proc() -> Vec<Vec<u8>> {
    let files = [
        "smaps",
        "fdinfo/0",
        "stat",
        "status",
        "mountinfo",
        "timers",
        "limits",
        "uid_map",
        "timens_offsets",
        "syscall",
        "sched",
        "net/igmp",
    ];
    let read = |name: &str| fs::read(format!("/proc/self/{name}")).unwrap_or_default();
    let mut all: Vec<Vec<u8>> = (0..)
        .zip(files)
        .map(|(n, name)| {
            let mut text = read(name);
            text.truncate(4000);
            text.insert(0, n);
            text
        })
        .collect();
    let more: [(u8, &str); 5] = [
        (
            1,
            "pos:\t0\nflags:\t02\ntfd:        5 events:       19 data: 5  pos:7 ino:2a8 sdev:9\n\
             lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n",
        ),
        (
            1,
            "clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49)\nit_interval: (1, 0)\n\
             sigmask:\t4002\neventfd-count: ff\nPid:\t3\n",
        ),
        (
            1,
            "inotify wd:1 ino:2 sdev:3 mask:fce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
             f_handle:0102030405060708\nfanotify flags:10 event-flags:0\n\
             fanotify mnt_id:12 mflags:0 mask:38 ignored_mask:40000000\n",
        ),
        (
            5,
            "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n",
        ),
        (10, "se.exec_start                :      3184104.190364\n"),
    ];
    all.extend(more.map(|(n, text)| [&[n], text.as_bytes()].concat()));
    all
}

/// A message with an attribute of attributes.
fn netlink() -> Vec<u8> {
    let mut bytes = Vec::new();
    for kind in [20u16, 0x100, 0x0a00, 0x0a03, 0x0a06, 0x0a09] {
        bytes.extend_from_slice(&52u32.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(&[2, 0, 0, 0]);
        for attribute in [1u8, 2, 3, 4] {
            bytes.extend_from_slice(&[8, 0, attribute, 0, 1, 0, 0, 0]);
        }
    }
    bytes
}

fn own_vdso() -> Vec<u8> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let range = maps.lines().find(|l| l.ends_with("[vdso]"));
    let range = range.and_then(|l| l.split(' ').next()?.split_once('-'));
    let hex = |s| u64::from_str_radix(s, 16).ok();
    let read = |(from, to)| {
        use std::os::unix::fs::FileExt;
        let (from, to) = (hex(from)?, hex(to)?);
        let mut text = vec![0; (to - from) as usize];
        let memory = fs::File::open("/proc/self/mem").ok()?;
        memory.read_exact_at(&mut text, from).ok()?;
        Some(text)
    };
    range.and_then(read).unwrap_or_default()
}

/// A sealed store with two images.
fn store() -> Vec<u8> {
    use rcr_engine::image::ImageSink;
    let mut writer = Writer::create(vec![0; 32768], [0; 16]).expect("there is room");
    writer.put("a", b"first").expect("there is room");
    writer.put("b", b"second").expect("there is room");
    writer.seal().expect("a vector takes everything")
}

/// An archive with one file, as an initrd.
fn cpio() -> Vec<u8> {
    let mut bytes = vec![1];
    for (name, data) in [("etc/initrd-release", "abcd"), ("TRAILER!!!", "")] {
        let len = data.len();
        let name_len = name.len() + 1;
        let header = format!(
            "070701{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{len:08x}{:08x}{:08x}{:08x}{:08x}{name_len:08x}{:08x}",
            1, 0o100644, 0, 0, 1, 0, 0, 0, 0, 0, 0
        );
        let at = bytes.len() - 1 + header.len() + name_len;
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(bytes.len() + 1 + at.next_multiple_of(4) - at, 0);
        bytes.extend_from_slice(data.as_bytes());
    }
    bytes
}
