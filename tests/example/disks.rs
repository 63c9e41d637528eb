//! Disks that are full, read-only or no place for a folder: exit code 5, the path named, nothing half-written.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::{checkpoints, clean, fail, folder, program, small, succeed};

/// `sh -c script`, with the program and its arguments in `"$@"`.
fn scripted(folder: &TempDir, script: &str, arguments: &str) -> Command {
    let mut command = clean(Command::new("sh"), folder.path());
    command.args(["-c", script, "sh"]).arg(program()).args(["--config", "small.toml"]);
    command.args(arguments.split_whitespace());
    command
}

/// `script` in a mount namespace of its own, whose mounts nobody else sees; none where that is not allowed. With
/// `REQUIRE_MOUNTS`, which the gate sets, it must be: so these tests cannot pass there without checking.
fn namespaced(folder: &TempDir, script: &str, arguments: &str) -> Option<Command> {
    let in_namespace = |command: &Command| {
        let mut unshare = clean(Command::new("unshare"), folder.path());
        unshare.args(["--mount", "--map-root-user"]).arg(command.get_program());
        unshare.args(command.get_args());
        unshare
    };
    fs::create_dir_all(folder.path().join("disk")).unwrap();
    let mut probe = Command::new("sh");
    probe.args(["-c", "mount -t tmpfs -o size=64k probe disk"]);
    let allowed = in_namespace(&probe).output().is_ok_and(|output| output.status.success());
    let required = std::env::var_os("REQUIRE_MOUNTS").is_some();
    assert!(allowed || !required, "mount namespaces are not allowed here");
    allowed.then(|| in_namespace(&scripted(folder, script, arguments)))
}

#[test]
fn a_place_below_a_file_ends_with_5() {
    let folder = folder();
    fs::write(folder.path().join("file"), "x").unwrap();
    let why = fail(small(&folder, "--out file/run"), 5);
    assert!(why.contains("file/run: Not a directory"), "{why}");
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"x");
}

#[test]
fn a_read_only_disk_ends_with_5() {
    let folder = folder();
    let script = r#"mount -t tmpfs -o ro,size=1m full disk && exec "$@""#;
    if let Some(command) = namespaced(&folder, script, "--steps 3 --out disk/run") {
        let why = fail(command, 5);
        assert!(why.starts_with("cannot create disk/run: Read-only file system"), "{why}");
    }
}

#[test]
fn a_full_disk_ends_with_5_and_leaves_whole_checkpoints_only() {
    let folder = folder();
    // What is on the disk at the end is copied off it, as the disk vanishes with its namespace.
    let script = r#"mount -t tmpfs -o size=1m full disk || exit 99; "$@"; code=$?
                    cp -r disk/run saved || exit 98; exit $code"#;
    let arguments = "--steps 100000 --out disk/run --set log.checkpoint_every=1 \
                     --set log.keep_last=1000 --set log.picture_images=1";
    let Some(command) = namespaced(&folder, script, arguments) else { return };
    let why = fail(command, 5);
    assert!(why.starts_with("cannot ") && why.contains("disk/run/"), "{why}");
    assert!(why.contains("No space left on device"), "{why}");
    assert_goes_on(&folder, "saved");
}

/// A limit on the size of files cuts a write short, without any privilege.
#[test]
fn a_write_that_is_cut_short_ends_with_5_and_leaves_whole_checkpoints_only() {
    let folder = folder();
    let arguments = "--out run --set log.picture_images=1 --resume auto";
    succeed(small(&folder, &format!("{arguments} --steps 3")));
    // 75 or 150 KiB, as shells count blocks differently: less than the moments, more than all else that is written.
    let script = r#"trap "" XFSZ; ulimit -f 150; exec "$@""#;
    let why = fail(scripted(&folder, script, &format!("{arguments} --steps 9")), 5);
    assert!(why.starts_with("cannot write run/ckpt/.tmp-step-00000009-"), "{why}");
    assert!(why.contains("File too large"), "{why}");
    assert_goes_on(&folder, "run");
}

/// The run has checkpoints, all of them whole and none half-written, and goes on from them.
fn assert_goes_on(folder: &TempDir, run: &str) {
    let path = folder.path().join(run);
    let steps = checkpoints(&path);
    let last = *steps.last().expect("some steps were saved");
    assert!(last >= 1);
    let names = fs::read_dir(path.join("ckpt")).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    let is_aside = |name: &std::ffi::OsString| name.to_string_lossy().starts_with(".tmp-");
    assert!(!names.iter().any(is_aside), "{names:?}");
    assert!(!Path::new(&path).join("report.html.tmp").exists());
    let steps = last + 2;
    let mut goes_on = clean(Command::new(program()), folder.path());
    goes_on.args(["--resume", run, "--steps", &steps.to_string()]);
    assert!(succeed(goes_on).starts_with(&format!("done steps={steps} ")));
}
