//! The store in RAM: trees dumped into it and restored out of it, and the store
//! alone against memcpy.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rcr_engine::dump::{self, DumpOptions};
use rcr_engine::restore::{self, RestoreOptions};
use rcr_engine::{Tree, freeze};
use rcr_pmem_store::layout::fresh_nonce;
use rcr_pmem_store::region::{HugeOptions, HugeRegion};
use rcr_pmem_store::{Reader, Region, Writer};
use serde::{Deserialize, Serialize};

use super::contest::Contest;
use super::load::Load;
use super::row::Row;
use super::tool::{Tool, milliseconds};
use super::tree::LoadTree;

/// Sizes in MiB and whether in huge pages.
const LOADS: &[Load] = &[
    Load::Small(1024),
    Load::Huge(1024),
    Load::Small(4096),
    Load::Huge(4096),
];

/// Least ratios: of the frozen time, the whole dump, the restore.
const BARS: (f64, f64, f64) = (4.0, 2.0, 3.0);

/// Where the region's huge pages are mounted.
const REGION_DIR: &str = "/run/rcr-bench-region";

/// What a dump into RAM took, milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Dumped {
    prepare: f64,
    frozen: f64,
    whole: f64,
}

/// The side of `run` that holds the region: dumps `pid`, and restores it when
/// told to on the standard input.
///
/// # Errors
/// What the engine or the store says.
pub fn hold(pid: i32) -> Result<()> {
    let tree = Tree::Root(pid);
    let options = DumpOptions::default();
    let start = Instant::now();
    let bytes = dump::estimate_bytes(&tree, &options)?;
    let spare = HugeOptions {
        dir: REGION_DIR.into(),
        ..HugeOptions::default()
    };
    // The index and the rounding of extents beside the images.
    let region = HugeRegion::allocate(bytes + (64 << 20), &spare)?;
    let nonce = fresh_nonce()?;
    let mut writer = Writer::create(region, nonce)?;
    let prepare = milliseconds(start.elapsed());
    let stopped = Instant::now();
    let frozen = freeze::freeze(&tree)?;
    dump::dump(&frozen, &mut writer, &options)?;
    let region = writer.seal()?;
    let standing = milliseconds(stopped.elapsed());
    frozen.kill();
    let dumped = Dumped {
        prepare,
        frozen: standing,
        whole: milliseconds(start.elapsed()),
    };
    println!("{}", serde_json::to_string(&dumped)?);
    std::io::stdin().read_line(&mut String::new())?;
    let start = Instant::now();
    let reader = Reader::open(region, &nonce)?;
    reader.verify()?;
    restore::restore(&reader, &RestoreOptions::default())?.resume()?;
    println!("{}", milliseconds(start.elapsed()));
    Ok(())
}

struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Holder {
    fn start(pid: i32) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .args(["store", &pid.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("stdin")?;
        let output = BufReader::new(child.stdout.take().context("stdout")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the dump into RAM failed: {}", self.child.wait()?);
        }
        Ok(line)
    }
}

fn once(load: Load, dir: &Path) -> Result<(Dumped, f64)> {
    let tree = LoadTree::start(load, dir)?;
    let mut holder = Holder::start(tree.pid)?;
    let dumped = serde_json::from_str(&holder.line()?)?;
    tree.await_gone()?;
    holder.input.write_all(b"go\n")?;
    let restored = holder.line()?.trim().parse()?;
    holder.child.wait()?;
    tree.check()?;
    Ok((dumped, restored))
}

/// Trees in RAM against the peer on tmpfs.
///
/// # Errors
/// When ours fails.
pub fn trees(contest: &Contest, only: Option<&str>, done: &mut dyn FnMut(Row)) -> Result<()> {
    for load in LOADS {
        let name = load.name();
        if only.is_some_and(|o| !format!("ram {name}").contains(o)) {
            continue;
        }
        let dir: PathBuf = contest.dir.join("load");
        let mut ours: [Vec<f64>; 4] = Default::default();
        let mut peer: [Vec<f64>; 3] = Default::default();
        for round in 0..=contest.samples {
            let (dumped, restored) = once(*load, &dir).with_context(|| name.clone())?;
            if round > 0 {
                let all = [dumped.frozen, dumped.whole, restored, dumped.prepare];
                ours.iter_mut().zip(all).for_each(|(to, v)| to.push(v));
            }
            let Some(tool @ Tool::Peer(_)) = &contest.peer else {
                continue;
            };
            let (dump, restore) = contest.once(tool, *load)?;
            if round > 0 {
                let frozen = dump.frozen_ms.context("the peer wrote no statistics")?;
                let all = [frozen, dump.ms, restore.ms];
                peer.iter_mut().zip(all).for_each(|(to, v)| to.push(v));
            }
        }
        let [frozen, whole, restored, prepare] = &ours;
        let prepare = super::row::median(prepare).unwrap_or(f64::NAN);
        let row =
            |what: &str, a, b, bar| Row::compare(format!("{what} ram {name}"), "ms", a, b, bar);
        done(row("frozen", frozen, &peer[0], BARS.0));
        let note = format!("{prepare:.0} of them to prepare the store");
        done(row("dump", whole, &peer[1], BARS.1).noting(note));
        done(row("restore", restored, &peer[2], BARS.2));
    }
    Ok(())
}

/// Size of the copies.
const COPY: usize = 1 << 30;

/// The store's own cost: filling and sealing, checking and reading, against a
/// plain copy of the same bytes, all pages warm.
///
/// # Errors
/// When the store refuses.
pub fn against_memcpy(samples: usize, done: &mut dyn FnMut(Row)) -> Result<()> {
    let source = vec![0x5a_u8; COPY];
    let mut target = vec![1_u8; COPY];
    let mut region = vec![1_u8; COPY + (1 << 20)];
    let (mut copies, mut writes, mut reads) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        let start = Instant::now();
        target.copy_from_slice(&source);
        copies.push(milliseconds(start.elapsed()));

        let nonce = fresh_nonce()?;
        let start = Instant::now();
        let mut writer = Writer::create(region, nonce)?;
        writer
            .allocate("pages", COPY as u64)?
            .copy_from_slice(&source);
        region = writer.seal()?;
        writes.push(milliseconds(start.elapsed()));

        let start = Instant::now();
        let reader = Reader::open(&mut region, &nonce)?;
        reader.verify()?;
        let pages = rcr_engine::image::ImageSource::get(&reader, "pages")?;
        target.copy_from_slice(pages.context("no pages")?);
        reads.push(milliseconds(start.elapsed()));
        if region.bytes().is_empty() || target[COPY - 1] != 0x5a {
            bail!("the store gave something else back");
        }
    }
    done(Row::compare(
        "store write 1024 (memcpy)",
        "ms",
        &writes,
        &copies,
        0.9,
    ));
    done(Row::compare(
        "store read 1024 (memcpy)",
        "ms",
        &reads,
        &copies,
        0.9,
    ));
    Ok(())
}
