//! Files whose names are gone, or were never there, or are not where they were.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl};
use nix::unistd::{Whence, linkat, lseek};

use super::refusals::expect;
use crate::conformance::{Case, Check, Stage};

/// The programs of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "files/unlinked-holes",
        "an unlinked file of 100 GiB, nearly all of it holes",
        holes,
    ),
    Case::new(
        "files/unlinked-large",
        "an unlinked file with 80 MiB of data",
        large,
    ),
    Case::new(
        "files/unlinked-append",
        "an unlinked file that is read only, and its appending writer",
        append,
    ),
    Case::new(
        "files/tmpfile",
        "a file without a name (O_TMPFILE), named afterwards",
        tmpfile,
    ),
    Case::new(
        "files/removed-directory",
        "an open directory that was removed",
        directory,
    ),
    Case::new(
        "files/removed-cwd",
        "a working directory that was removed with its parents",
        cwd,
    ),
    Case::new(
        "files/other-link",
        "an unlinked file with another name elsewhere",
        other_link,
    ),
    Case::new(
        "files/replaced",
        "an unlinked file whose name has another file now",
        replaced,
    ),
    Case::new("files/renamed", "a file renamed while open", renamed),
    Case::new(
        "files/unlinked-fifo",
        "a named pipe without its name, with data",
        fifo,
    ),
    Case::new(
        "files/unlinked-path",
        "O_PATH descriptors of an unlinked file, link and directory",
        by_path,
    ),
    Case::new(
        "files/unlinked-tmpfs",
        "unlinked files on a tmpfs",
        on_tmpfs,
    ),
    Case::new(
        "refusals/other-link",
        "an unlinked file whose other name is out of sight",
        hidden_link,
    )
    .refused(),
];

fn new(stage: &Stage, name: &str) -> Result<File> {
    let mut open = File::options();
    open.read(true).write(true).create_new(true);
    Ok(open.open(stage.path(name))?)
}

fn holes(stage: &Stage) -> Result<Check> {
    const SIZE: u64 = 100 << 30;
    let file = new(stage, "sparse")?;
    fs::remove_file(stage.path("sparse"))?;
    file.set_len(SIZE)?;
    let places = [0, 5 << 20, 50 << 30, SIZE - 3];
    for at in places {
        file.write_all_at(b"abc", at)?;
    }
    let blocks = file.metadata()?.blocks();
    Ok(Box::new(move |f| {
        f.same("size", &SIZE, &file.metadata()?.len());
        for at in places {
            let mut three = [0; 3];
            file.read_exact_at(&mut three, at)?;
            f.same(&format!("data at {at}"), b"abc", &three);
        }
        f.that("holes", file.metadata()?.blocks() <= blocks + 64);
        f.same(
            "a hole",
            &(1 << 30),
            &lseek(&file, 1 << 30, Whence::SeekHole)?,
        );
        Ok(())
    }))
}

fn large(stage: &Stage) -> Result<Check> {
    let file = new(stage, "large")?;
    fs::remove_file(stage.path("large"))?;
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    for n in 0..80 {
        file.write_all_at(&block, n << 20)?;
    }
    Ok(Box::new(move |f| {
        f.same("size", &(80 << 20), &file.metadata()?.len());
        let mut read = vec![0; 1 << 20];
        for n in [0, 31, 79] {
            file.read_exact_at(&mut read, n << 20)?;
            f.that(format!("MiB {n}"), read == block);
        }
        Ok(())
    }))
}

fn append(stage: &Stage) -> Result<Check> {
    let path = stage.path("log");
    let mut writer = File::options().append(true).create(true).open(&path)?;
    let mut reader = File::open(&path)?;
    let permissions: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o400);
    fs::set_permissions(&path, permissions)?;
    fs::remove_file(&path)?;
    writer.write_all(b"first ")?;
    Ok(Box::new(move |f| {
        let at = reader.stream_position()?;
        writer.write_all(b"second")?;
        let mut text = String::new();
        reader.seek(SeekFrom::Start(0))?;
        reader.read_to_string(&mut text)?;
        f.that(format!("the log: {text}"), text.starts_with("first second"));
        f.that("offset", at == 0 || at == text.len() as u64 - 6);
        f.same("mode", &0o400, &(reader.metadata()?.mode() & 0o7777));
        let refused = (&reader).write(b"x").map_err(|e| e.raw_os_error());
        f.same("a write to the reader", &Err(Some(libc::EBADF)), &refused);
        Ok(())
    }))
}

fn tmpfile(stage: &Stage) -> Result<Check> {
    let dir = stage.files();
    let make = move || -> Result<File> {
        let mut open = File::options();
        open.read(true).write(true).custom_flags(libc::O_TMPFILE);
        let mut file = open.open(&dir)?;
        file.write_all(b"draft")?;
        Ok(file)
    };
    let mut file = make()?;
    let flags = fcntl(&file, FcntlArg::F_GETFL)?;
    ensure!(
        flags & libc::O_TMPFILE == libc::O_TMPFILE,
        "flags {flags:o}"
    );
    let stage = stage.clone();
    let mut turn = 0;
    Ok(Box::new(move |f| {
        f.same("flags", &flags, &fcntl(&file, FcntlArg::F_GETFL)?);
        f.same("offset", &5, &file.stream_position()?);
        turn += 1;
        let name = stage.path(&format!("final.{turn}"));
        let magic = format!("/proc/self/fd/{}", file.as_raw_fd());
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        let named = linkat(AT_FDCWD, magic.as_str(), AT_FDCWD, &name, follow);
        f.same("a name for it", &Ok(()), &named);
        f.same(
            "content by its name",
            "draft",
            fs::read_to_string(&name)?.as_str(),
        );
        file = make()?;
        Ok(())
    }))
}

fn directory(stage: &Stage) -> Result<Check> {
    let path = stage.path("dir");
    fs::create_dir(&path)?;
    let permissions: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(&path, permissions)?;
    let dir = File::open(&path)?;
    fs::remove_dir(&path)?;
    Ok(Box::new(move |f| {
        let meta = dir.metadata()?;
        f.that("a directory", meta.is_dir());
        f.same("mode", &0o711, &(meta.mode() & 0o7777));
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        let flags = OFlag::O_CREAT | OFlag::O_RDWR;
        let made = nix::fcntl::openat(&dir, "new", flags, mode).map(drop);
        f.same("a file in it", &Err(Errno::ENOENT), &made);
        f.that("no name came back", !path.exists());
        Ok(())
    }))
}

fn cwd(stage: &Stage) -> Result<Check> {
    let top = stage.path("top");
    let deep = top.join("middle/deep");
    fs::create_dir_all(&deep)?;
    std::env::set_current_dir(&deep)?;
    fs::remove_dir_all(&top)?;
    Ok(Box::new(move |f| {
        let gone = std::env::current_dir().map_err(|e| e.raw_os_error());
        f.same("its name", &Err(Some(libc::ENOENT)), &gone);
        let made = fs::write("new", "").map_err(|e| e.raw_os_error());
        f.same("a file in it", &Err(Some(libc::ENOENT)), &made);
        f.that("no name came back", !top.exists());
        Ok(())
    }))
}

fn other_link(stage: &Stage) -> Result<Check> {
    let (path, near, far) = (
        stage.path("dir/name"),
        stage.path("dir/near"),
        stage.path("else/where/far"),
    );
    fs::create_dir_all(stage.path("dir"))?;
    fs::create_dir_all(stage.path("else/where"))?;
    let make = |other: &std::path::Path| -> Result<File> {
        fs::write(&path, "shared content")?;
        fs::hard_link(&path, other)?;
        let file = File::options().read(true).write(true).open(&path)?;
        fs::remove_file(&path)?;
        Ok(file)
    };
    let files = [(make(&near)?, near), (make(&far)?, far)];
    Ok(Box::new(move |f| {
        for (file, other) in &files {
            let (open, named) = (file.metadata()?, fs::metadata(other)?);
            f.same("one inode", &(named.ino(), 1), &(open.ino(), open.nlink()));
            file.write_all_at(b"SHARED", 0)?;
            f.same(
                "by its name",
                "SHARED content",
                fs::read_to_string(other)?.as_str(),
            );
        }
        f.that("the old name is gone", !path.exists());
        let shown = fs::read_link(format!("/proc/self/fd/{}", files[0].0.as_raw_fd()))?;
        let shown = shown.display().to_string();
        f.that(
            format!("shown as {shown}"),
            shown.ends_with("dir/name (deleted)"),
        );
        Ok(())
    }))
}

fn hidden_link(stage: &Stage) -> Result<Check> {
    let (path, hidden) = (stage.path("name"), stage.path("hidden"));
    fs::create_dir(&hidden)?;
    fs::write(&path, "x")?;
    fs::hard_link(&path, hidden.join("other"))?;
    let file = File::open(&path)?;
    fs::remove_file(&path)?;
    nix::mount::mount(
        Some("conformance"),
        &hidden,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )?;
    expect(stage, &file, "another name that was not found")?;
    Ok(Box::new(move |f| {
        f.same("still open", &1, &file.metadata()?.nlink());
        Ok(())
    }))
}

fn replaced(stage: &Stage) -> Result<Check> {
    let path = stage.path("config");
    fs::write(&path, "old")?;
    let old = File::open(&path)?;
    fs::remove_file(&path)?;
    fs::write(&path, "new")?;
    let dir = stage.path("dir");
    fs::create_dir(&dir)?;
    let old_dir = File::open(&dir)?;
    fs::remove_dir(&dir)?;
    fs::create_dir(&dir)?;
    fs::write(dir.join("inside"), "")?;
    Ok(Box::new(move |f| {
        let mut text = [0; 3];
        old.read_exact_at(&mut text, 0)?;
        f.same("the open one", b"old", &text);
        f.same(
            "the one by name",
            "new",
            fs::read_to_string(&path)?.as_str(),
        );
        f.that(
            "directories differ",
            old_dir.metadata()?.ino() != fs::metadata(&dir)?.ino(),
        );
        f.same("the new one's content", &1, &fs::read_dir(&dir)?.count());
        Ok(())
    }))
}

fn renamed(stage: &Stage) -> Result<Check> {
    let (a, b) = (stage.path("a"), stage.path("b"));
    fs::create_dir(&a)?;
    fs::write(a.join("file"), "content")?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(a.join("file"))?;
    let dir = File::open(&a)?;
    fs::rename(a.join("file"), a.join("moved"))?;
    fs::rename(&a, &b)?;
    let inode = file.metadata()?.ino();
    Ok(Box::new(move |f| {
        f.same("inode", &inode, &file.metadata()?.ino());
        f.same("by name", &inode, &fs::metadata(b.join("moved"))?.ino());
        f.same(
            "directory",
            &fs::metadata(&b)?.ino(),
            &dir.metadata()?.ino(),
        );
        Ok(())
    }))
}

fn fifo(stage: &Stage) -> Result<Check> {
    let path = stage.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o640))?;
    let mut both = File::options().read(true).write(true).open(&path)?;
    let mut writer = File::options().write(true).open(&path)?;
    fs::remove_file(&path)?;
    writer.write_all(b"queued")?;
    Ok(Box::new(move |f| {
        let mut text = [0; 6];
        both.read_exact(&mut text)?;
        f.same("queued data", b"queued", &text);
        writer.write_all(b"queued")?;
        f.that("a named pipe", both.metadata()?.file_type().is_fifo());
        f.same("mode", &0o640, &(both.metadata()?.mode() & 0o7777));
        Ok(())
    }))
}

fn by_path(stage: &Stage) -> Result<Check> {
    let open = |name: &str| -> Result<File> {
        let mut open = File::options();
        open.read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
        Ok(open.open(stage.path(name))?)
    };
    fs::write(stage.path("file"), "content")?;
    std::os::unix::fs::symlink("elsewhere", stage.path("link"))?;
    fs::create_dir(stage.path("dir"))?;
    let (file, link, dir) = (open("file")?, open("link")?, open("dir")?);
    fs::remove_file(stage.path("file"))?;
    fs::remove_file(stage.path("link"))?;
    fs::remove_dir(stage.path("dir"))?;
    std::os::unix::fs::symlink("target", stage.path("kept"))?;
    let kept = open("kept")?;
    Ok(Box::new(move |f| {
        f.same("size of the file", &7, &file.metadata()?.len());
        let magic = format!("/proc/self/fd/{}", file.as_raw_fd());
        f.same(
            "its content",
            "content",
            fs::read_to_string(magic)?.as_str(),
        );
        f.that("the link", link.metadata()?.file_type().is_symlink());
        let to = nix::fcntl::readlinkat(&link, "")?;
        f.same("where it leads", "elsewhere", to.to_string_lossy().as_ref());
        f.that("the directory", dir.metadata()?.is_dir());
        let to = nix::fcntl::readlinkat(&kept, "")?;
        f.same(
            "where the other leads",
            "target",
            to.to_string_lossy().as_ref(),
        );
        Ok(())
    }))
}

fn on_tmpfs(stage: &Stage) -> Result<Check> {
    let path = stage.in_memory();
    let mut open = File::options();
    open.read(true).write(true).create_new(true);
    let mut file = open.open(&path)?;
    file.write_all(b"in memory")?;
    file.set_len(1 << 30)?;
    fs::remove_file(&path)?;
    let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(Box::new(move |f| {
        f.same("size", &(1 << 30), &file.metadata()?.len());
        f.same("offset", &9, &file.stream_position()?);
        let mut text = [0; 9];
        again.read_exact_at(&mut text, 0)?;
        f.same("content by the other", b"in memory", &text);
        f.same(
            "one inode",
            &file.metadata()?.ino(),
            &again.metadata()?.ino(),
        );
        f.that("holes", again.metadata()?.blocks() < 100);
        Ok(())
    }))
}
