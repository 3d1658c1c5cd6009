//! A program's side of the conversation with the runner: files in its
//! directory, which outlive it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::programs::ALL;
use super::{Case, Findings, Unavailable};

/// How often files are looked for.
pub const POLL: Duration = Duration::from_millis(3);

/// Where a program lives.
#[derive(Debug, Clone)]
pub struct Stage {
    dir: PathBuf,
}

impl Stage {
    /// The directory of one run.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// A path of the program's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("files").join(name)
    }

    /// The program's own directory.
    pub fn files(&self) -> PathBuf {
        self.dir.join("files")
    }

    /// A path of the program's own on a tmpfs.
    pub fn in_memory(&self) -> PathBuf {
        let name = self.dir.display().to_string().replace('/', ".");
        Path::new("/dev/shm").join(name.trim_start_matches('.'))
    }

    /// Where what it prints goes.
    pub fn output(&self) -> PathBuf {
        self.dir.join("output")
    }

    /// Where the images of a cycle go.
    pub fn images(&self, cycle: u32) -> PathBuf {
        self.dir.join(format!("images.{cycle}"))
    }

    /// Where the images of a pre-dump go.
    pub fn pre_images(&self, n: u32) -> PathBuf {
        self.dir.join(format!("pre-images.{n}"))
    }

    /// Tells the runner words that a refusal has to contain.
    pub fn expect_refusal(&self, words: &[String]) -> Result<()> {
        Ok(fs::write(self.dir.join("refusal"), words.join("\n"))?)
    }

    /// The same, where only a dump of frozen processes can know.
    pub fn expect_dump_refusal(&self, words: &[String]) -> Result<()> {
        fs::write(self.dir.join("refusal-late"), "")?;
        self.expect_refusal(words)
    }

    /// Whether the preflight is to refuse, too.
    pub fn refused_early(&self) -> bool {
        !self.dir.join("refusal-late").exists()
    }

    /// The words of [`Stage::expect_refusal`].
    pub fn refusal(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.dir.join("refusal"))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Starts a process beside the tree that stays alive all the time: `life`
    /// runs in it. The caller must have a single thread.
    pub fn outsider(&self, life: impl FnOnce() -> Result<()>) -> Result<()> {
        use nix::unistd::{ForkResult, fork};
        // SAFETY: there is one thread, so no lock is held that the child would miss.
        if let ForkResult::Parent { child } = unsafe { fork() }? {
            nix::sys::wait::waitpid(child, None)?;
            return Ok(());
        }
        // SAFETY: as above.
        let status = match unsafe { fork() } {
            Ok(ForkResult::Parent { child }) => {
                i32::from(fs::write(self.outsider_file(), child.to_string()).is_err())
            }
            Ok(ForkResult::Child) => {
                super::sys::close_inherited();
                let alone = nix::unistd::setsid();
                i32::from(alone.is_err() || life().is_err())
            }
            Err(_) => 1,
        };
        std::process::exit(status)
    }

    fn outsider_file(&self) -> PathBuf {
        self.dir.join("outsider")
    }

    /// Processes beside the tree.
    pub fn outsiders(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.outsider_file()).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// Marks that the program comes out of images.
    pub fn restored_file(&self) -> PathBuf {
        self.dir.join("restored")
    }

    /// Whether the program comes out of images.
    pub fn restored(&self) -> bool {
        self.restored_file().exists()
    }

    /// The program is set up.
    pub fn ready_file(&self) -> PathBuf {
        self.dir.join("ready")
    }

    /// The program cannot be set up on this machine; holds the reason.
    pub fn skip_file(&self) -> PathBuf {
        self.dir.join("skip")
    }

    /// The program is to check itself.
    pub fn go_file(&self, cycle: u32) -> PathBuf {
        self.dir.join(format!("go.{cycle}"))
    }

    /// What it found.
    pub fn result_file(&self, cycle: u32) -> PathBuf {
        self.dir.join(format!("result.{cycle}"))
    }

    /// Writes a file so that it appears whole.
    pub fn publish(&self, path: &Path, text: &str) -> Result<()> {
        let draft = self.dir.join("draft");
        fs::write(&draft, text).context("draft")?;
        fs::rename(&draft, path).with_context(|| path.display().to_string())
    }
}

/// The life of a program: setup, then a check whenever the runner says so.
pub fn perform(name: &str, dir: &Path) -> Result<()> {
    let case: &Case = ALL
        .iter()
        .flat_map(|area| area.iter())
        .find(|c| c.name == name)
        .ok_or_else(|| anyhow!("no program {name}"))?;
    nix::unistd::setsid().context("setsid")?;
    let stage = Stage::new(dir);
    fs::create_dir(stage.files())?;
    let mut check = match (case.setup)(&stage) {
        Ok(check) => check,
        Err(e) => match Unavailable::of(&e) {
            Some(why) => return stage.publish(&stage.skip_file(), why),
            None => return Err(e),
        },
    };
    stage.publish(&stage.ready_file(), "")?;
    for cycle in 1.. {
        let go = stage.go_file(cycle);
        while !go.exists() {
            std::thread::sleep(POLL);
        }
        let mut findings = Findings::default();
        findings.run(&mut check);
        let text: String = findings.lines().iter().map(|l| format!("{l}\n")).collect();
        stage.publish(&stage.result_file(cycle), &text)?;
    }
    Ok(())
}
