//! What cannot be done is refused in one sentence, with its exit code, and nothing is written.

use std::fs;
use std::process::Command;

use tempfile::TempDir;

use crate::{checkpoints, clean, fail, finish, folder, program, small, succeed, tensors, tree};

/// The sentence of a refusal that leaves no trace.
fn refusal(folder: &TempDir, arguments: &str, code: i32) -> String {
    let before = tree(folder.path());
    let why = fail(small(folder, arguments), code);
    assert_eq!(tree(folder.path()), before, "something was written: {why}");
    why
}

fn resume(folder: &TempDir, arguments: &str) -> Command {
    let mut command = clean(Command::new(program()), folder.path());
    command.args(["--resume", "auto", "--out", "run"]).args(arguments.split_whitespace());
    command
}

#[test]
fn devices_that_are_not_there_end_with_2() {
    let why = refusal(&folder(), "--device cuda", 2);
    // What is missing depends on the machine; a driver is, here.
    assert!(why.starts_with("--device cuda: ") && why.contains("; "), "{why}");
}

#[test]
fn data_that_is_not_there_ends_with_4() {
    let folder = folder();
    fs::create_dir(folder.path().join("empty")).unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    fs::create_dir(folder.path().join("few")).unwrap();
    let photo = format!("{}/animal/dog_by_will_langenberg.jpg", crate::PHOTOS);
    fs::copy(photo, folder.path().join("few/dog.jpg")).unwrap();
    for (data, words) in [
        ("missing", "data missing: cannot be read"),
        ("empty", "data empty: "),
        ("file", "data file: is a file; set data.path to the folder"),
        ("few", "holds 1 images, fewer than the 8 of a step; lower optim.global_batch"),
    ] {
        let why = refusal(&folder, &format!("--out run --data {data}"), 4);
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn a_folder_of_broken_images_ends_with_4() {
    let folder = folder();
    fs::create_dir(folder.path().join("broken")).unwrap();
    for i in 0..9 {
        fs::write(folder.path().join(format!("broken/{i}.jpg")), [0xff, 0xd8, 0xff, i]).unwrap();
    }
    let why = fail(small(&folder, "--out run --data broken"), 4);
    assert!(why.contains("unreadable images of 9") && why.contains("max_bad_share"), "{why}");
    let report = fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    assert!(report.contains("unreadable images of 9"), "the report says how it ended");
}

#[test]
fn unknown_keys_and_impossible_sizes_end_with_1() {
    let folder = folder();
    for (assignment, words) in [
        ("optim.learning_rate=1", "unknown key `optim.learning_rate`"),
        ("model.pach_size=4", "did you mean `model.patch_size`?"),
        ("model.image_size=18", "use 16 or 20"),
        ("model.heads=5", "does not divide model.dim 24; use 4 or 6"),
        ("model.dim=22", "not divisible by 4"),
        ("method.mask_ratio=0.99", "keeps none of 16 patches; use at most 0.9375"),
        ("model.patch_size=16", "is a single patch"),
        ("optim.micro_batch=3", "does not divide optim.global_batch 8; use 2 or 4"),
        ("method.mask_block=9", "larger than the grid of 4 x 4 patches"),
    ] {
        let why = refusal(&folder, &format!("--out run --set {assignment}"), 1);
        assert!(why.contains(words), "{assignment}: {why}");
    }
}

#[test]
fn an_existing_run_is_refused_or_replaced_but_for_what_others_put_there() {
    let folder = folder();
    succeed(small(&folder, "--steps 6 --out run --set log.checkpoint_every=2"));
    let run = folder.path().join("run");
    let why = refusal(&folder, "--steps 4 --out run", 1);
    assert!(why.starts_with("run: exists and is not empty; "), "{why}");
    fs::write(run.join("notes.md"), "mine").unwrap();
    succeed(small(&folder, "--steps 3 --out run --overwrite"));
    assert_eq!(fs::read_to_string(run.join("notes.md")).unwrap(), "mine");
    assert_eq!(checkpoints(&run), [3]);

    fs::create_dir(folder.path().join("other")).unwrap();
    fs::write(folder.path().join("other/viz"), "mine").unwrap();
    let why = refusal(&folder, "--out other --overwrite", 1);
    assert!(why.starts_with("other: is not empty and holds no config.toml"), "{why}");
}

#[test]
fn checkpoints_that_do_not_fit_or_are_damaged_are_not_gone_on_from() {
    let folder = folder();
    let run = folder.path().join("run");
    succeed(small(&folder, "--steps 6 --out run --set log.checkpoint_every=3"));
    let whole = tensors(&run, 6);
    let refused = |arguments: &str, code: i32| {
        let before = tree(folder.path());
        let why = fail(resume(&folder, arguments), code);
        assert_eq!(tree(folder.path()), before, "something was written: {why}");
        why
    };
    let why = refused("--set model.dim=48", 1);
    assert!(why.contains("belongs to another architecture"), "{why}");
    let why = refused("--seed 7", 1);
    assert!(why.contains("was saved with seed 0; give --seed 0"), "{why}");

    let damage = |step: u64| {
        let file = run.join(format!("ckpt/step-{step:08}/model.safetensors"));
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 0x10;
        fs::write(file, bytes).unwrap();
    };
    damage(6);
    let (output, stdout, stderr) = finish(resume(&folder, ""));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stdout.contains("resume    after step 3\n"), "{stdout}");
    let [warning] = stderr.lines().collect::<Vec<_>>()[..] else { panic!("{stderr}") };
    assert!(warning.starts_with("warning: checkpoint run/ckpt/step-00000006 is rejected"));
    assert!(warning.contains("crc32c"), "{warning}");
    let again = run.join("ckpt/step-00000006.2");
    assert!(again.is_dir() && !run.join("ckpt/step-00000006").exists());
    let file = |name: &str| fs::read(again.join(name)).unwrap();
    assert!(whole == [file("model.safetensors"), file("optim.safetensors")]);

    fs::rename(again, run.join("ckpt/step-00000006")).unwrap();
    damage(3);
    damage(6);
    let why = refused("", 5);
    assert!(why.contains("no checkpoint of it is sound") && why.contains("--overwrite"), "{why}");
}
