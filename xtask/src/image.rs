//! Makes the virtual machines' images: Debian stable with two stock kernels, and
//! the same with the services that people run. All steps are cached by what goes
//! into them.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use rcr_tests::vm::image::Image;

use crate::host::{KEYRING, as_root, install_missing, run};
use crate::{artifacts, mirror, root, vm_dir};

/// Debian's release in the guest.
const SUITE: &str = "trixie";

/// What an image is made of.
struct Flavour {
    /// Begins its cache's name.
    name: &'static str,
    /// Folders of `xtask` that say what is in it, applied in this order.
    recipes: &'static [&'static str],
    /// Size of the root file system; the file is sparse.
    root_size: &'static str,
}

/// What the scenarios run on.
const PLAIN: Flavour = Flavour {
    name: "base",
    recipes: &["image"],
    root_size: "4G",
};

/// What `cargo xtask services` runs on.
const SERVICES: Flavour = Flavour {
    name: "services",
    recipes: &["image", "services"],
    root_size: "8G",
};

/// The scenarios' image, made now if it is not there yet.
///
/// # Errors
/// When a package or a tool is missing and cannot be had, or a step fails.
pub fn prepare() -> Result<Image> {
    make(&PLAIN)
}

/// The services' image, made now if it is not there yet.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_services() -> Result<Image> {
    make(&SERVICES)
}

fn make(flavour: &Flavour) -> Result<Image> {
    install_missing()?;
    let dir = vm_dir();
    fs::create_dir_all(&dir)?;
    let lock = File::create(dir.join("image.lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let base = base(&dir, flavour)?;
    with_agent(&dir, &base)
}

/// Debian as mmdebstrap makes it, as a file system.
fn base(dir: &Path, flavour: &Flavour) -> Result<PathBuf> {
    let recipes: Vec<PathBuf> = flavour
        .recipes
        .iter()
        .map(|name| root().join("xtask").join(name))
        .collect();
    let mut hasher = DefaultHasher::new();
    (SUITE, flavour.root_size).hash(&mut hasher);
    for recipe in &recipes {
        hash_tree(recipe, &mut hasher)?;
    }
    let base = dir.join(format!("{}-{:016x}", flavour.name, hasher.finish()));
    if base.exists() {
        return Ok(base);
    }
    println!(
        "Making {} (Debian {SUITE}); this is done once",
        base.display()
    );
    let work = dir.join(format!("{}.new", flavour.name));
    run(as_root("rm").arg("-rf").arg(&work))?;
    fs::create_dir_all(work.join("root"))?;
    let tar = work.join("root.tar");
    bootstrap(&recipes, &tar)?;
    run(as_root("tar")
        .arg("-xf")
        .arg(&tar)
        .arg("-C")
        .arg(work.join("root"))
        .arg("--exclude=./dev/*"))?;
    run(as_root("/sbin/mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-L",
            "root",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
        ])
        .arg("-d")
        .arg(work.join("root"))
        .arg(work.join("root.img"))
        .arg(flavour.root_size))?;
    run(Command::new("tar")
        .arg("-xf")
        .arg(&tar)
        .arg("-C")
        .arg(&work)
        .arg("./boot"))?;
    run(as_root("rm").arg("-rf").arg(work.join("root")).arg(&tar))?;
    fs::rename(&work, &base)?;
    Ok(base)
}

fn bootstrap(recipes: &[PathBuf], tar: &Path) -> Result<()> {
    let packages = recipes
        .iter()
        .map(|recipe| fs::read_to_string(recipe.join("packages")))
        .collect::<Result<String, _>>()?;
    let packages: Vec<&str> = packages
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .collect();
    let backports = format!("{SUITE}-backports");
    let mut command = as_root("env");
    command.arg(format!("BACKPORTS={backports}"));
    command.args(["mmdebstrap", "--quiet", "--variant=apt"]);
    command.arg(format!("--include={}", packages.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\"");
    for unneeded in ["man", "doc", "locale"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{unneeded}/*"));
    }
    for recipe in recipes {
        let (files, recipe) = (recipe.join("root"), recipe.display());
        if files.exists() {
            command.arg(format!("--essential-hook=sync-in \"{recipe}/root\" /"));
        }
        command.arg(format!(
            "--customize-hook=sh \"{recipe}/customize.sh\" \"$1\""
        ));
    }
    command.arg(SUITE).arg(tar);
    command.args(sources(&backports)?);
    run(&mut command)
}

/// The guest's apt sources: this machine's mirrors with the guest's suites.
fn sources(backports: &str) -> Result<Vec<String>> {
    let have = mirror::sources()?;
    let main = have
        .iter()
        .find(|source| {
            source
                .suites
                .iter()
                .any(|suite| suite.ends_with("-updates"))
        })
        .or_else(|| {
            have.iter()
                .find(|source| source.uri.trim_end_matches('/').ends_with("/debian"))
        })
        .context("apt's sources on this machine name no Debian mirror")?;
    let line = |source: &mirror::Source, suite: &str| {
        let key = source.signed_by.as_deref().unwrap_or(KEYRING);
        format!("deb [signed-by={key}] {} {suite} main", source.uri)
    };
    let mut lines = vec![line(main, SUITE), line(main, backports)];
    if let Some(security) = have.iter().find(|source| {
        source
            .suites
            .iter()
            .any(|suite| suite.ends_with("-security"))
    }) {
        lines.push(line(security, &format!("{SUITE}-security")));
    }
    Ok(lines)
}

/// The base with the agent in it.
fn with_agent(dir: &Path, base: &Path) -> Result<Image> {
    let mut hasher = DefaultHasher::new();
    base.file_name().hash(&mut hasher);
    for source in ["src/bin/rcr-agent.rs", "src/wire.rs"] {
        fs::read(root().join("tests").join(source))?.hash(&mut hasher);
    }
    let image = dir.join(format!("image-{:016x}", hasher.finish()));
    if !image.exists() {
        let agent = artifacts::build("rcr-tests", &["rcr-agent"])?.remove(0);
        let work = dir.join("image.new");
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir_all(&work)?;
        let to = "/usr/local/lib/rcr-agent";
        run(Command::new("cp")
            .args(["--sparse=always", "-r"])
            .arg(base.join("root.img"))
            .arg(base.join("boot"))
            .arg(&work))?;
        let script = work.join("debugfs");
        fs::write(
            &script,
            format!(
                "write {} {to}\nsif {to} mode 0100755\nsif {to} uid 0\nsif {to} gid 0\n",
                agent.display()
            ),
        )?;
        run(Command::new("/sbin/debugfs")
            .arg("-w")
            .arg("-f")
            .arg(&script)
            .arg(work.join("root.img"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null()))?;
        fs::rename(&work, &image)?;
    }
    Image::open(&image)
}

/// By names and content, not by where the checkout lies: checkouts may share
/// their images.
fn hash_tree(path: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    path.file_name().hash(hasher);
    if path.is_dir() {
        let mut entries: Vec<PathBuf> = fs::read_dir(path)?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<Result<_, _>>()?;
        entries.sort();
        return entries
            .iter()
            .try_for_each(|entry| hash_tree(entry, hasher));
    }
    fs::read(path)
        .with_context(|| path.display().to_string())?
        .hash(hasher);
    Ok(())
}
