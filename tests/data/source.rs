//! Folders and CIFAR-10 batches.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use pixmim::data::Image;
use pixmim::data::decode::Options;
use pixmim::data::source::{BadImage, Source};
use tempfile::tempdir;

use crate::{fixture, fixture_path};

fn open(path: &Path) -> Source {
    Source::open(path, &Options::default()).unwrap()
}

fn refusal(path: &Path) -> String {
    let error = Source::open(path, &Options::default()).unwrap_err();
    assert_eq!(error.exit_code(), 4);
    error.to_string()
}

fn put(root: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn names(source: &Source) -> Vec<String> {
    (0..source.len()).map(|i| source.name(i)).collect()
}

#[test]
fn files_are_ordered_by_their_bytes_and_labelled_by_their_first_folder() {
    let root = tempdir().unwrap();
    for name in ["b/x.JPEG", "b/deep/er/a.png", "a-b/1.webp", "a/2.jpg", "a/10.jpeg", "c.jpg"] {
        put(root.path(), name, "");
    }
    for name in ["a/notes.txt", "a/jpg", "a/.hidden.jpg", ".cache/x.jpg", "a/x.jpg.part"] {
        put(root.path(), name, "");
    }
    fs::create_dir(root.path().join("empty")).unwrap();
    let source = open(root.path());
    assert_eq!(
        names(&source),
        ["a-b/1.webp", "a/10.jpeg", "a/2.jpg", "b/deep/er/a.png", "b/x.JPEG", "c.jpg"]
    );
    assert_eq!(source.classes(), ["a-b", "a", "b"]);
    let labels: Vec<_> = (0..source.len()).map(|i| source.label(i)).collect();
    assert_eq!(labels, [Some(0), Some(1), Some(1), Some(2), Some(2), None]);
}

#[test]
fn links_to_files_are_followed_and_links_to_folders_are_not() {
    let root = tempdir().unwrap();
    put(root.path(), "a/1.png", fixture("colour.png"));
    symlink(root.path().join("a/1.png"), root.path().join("a/2.png")).unwrap();
    symlink(root.path(), root.path().join("a/loop")).unwrap();
    symlink(root.path(), root.path().join("a/loop.png")).unwrap();
    symlink(root.path().join("gone"), root.path().join("a/3.png")).unwrap();
    let source = open(root.path());
    assert_eq!(names(&source), ["a/1.png", "a/2.png", "a/3.png"]);
    assert_eq!(source.read(0), source.read(1));
    assert!(source.read(0).is_ok());
    assert!(source.read(2).is_err());
}

#[test]
fn a_file_is_read_by_its_content() {
    let root = tempdir().unwrap();
    fs::copy(fixture_path("png_named.JPEG"), root.path().join("n02105855_2933.JPEG")).unwrap();
    let image = open(root.path()).read(0).unwrap();
    assert_eq!(image.pixels, fixture("png_named.JPEG.rgb"));
}

#[test]
fn a_bad_image_says_which_and_why() {
    let root = tempdir().unwrap();
    put(root.path(), "a/0.jpg", &fixture("colour.jpg")[..700]);
    put(root.path(), "a/1.jpg", "hello");
    put(root.path(), "a/2.jpg", vec![0; 2000]);
    put(root.path(), "a/3.jpg", "");
    let options = Options { max_file_bytes: 1000, ..Options::default() };
    let source = Source::open(root.path(), &options).unwrap();
    fs::remove_file(root.path().join("a/3.jpg")).unwrap();
    let bad = |sample| source.read(sample).unwrap_err();
    assert_eq!(
        bad(0),
        BadImage { sample: 0, name: "a/0.jpg".into(), reason: "truncated JPEG".into() }
    );
    assert_eq!(bad(1).reason, "not an image: starts with 68 65 6c 6c 6f");
    assert_eq!(bad(2).reason, "too large: 2000 bytes; data.max_file_mib allows 1000");
    assert_eq!(bad(3).reason, "No such file or directory (os error 2)");
}

#[test]
fn a_pipe_is_not_waited_for() {
    let root = tempdir().unwrap();
    let pipe = root.path().join("pipe.jpg");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(open(root.path()).read(0).unwrap_err().reason, "not a file");
}

#[test]
fn a_path_without_images_is_refused_with_the_cure() {
    let root = tempdir().unwrap();
    let missing = refusal(&root.path().join("gone"));
    assert!(missing.contains("gone") && missing.contains("set data.path"), "{missing}");
    let empty = refusal(root.path());
    assert!(empty.contains("holds no .jpg") && empty.contains("set data.path"), "{empty}");
    put(root.path(), "a.jpg", "");
    let file = refusal(&root.path().join("a.jpg"));
    assert!(file.contains("is a file; set data.path to the folder"), "{file}");
}

#[test]
fn folders_are_entered_32_deep() {
    let root = tempdir().unwrap();
    let folders = "d/".repeat(32);
    put(root.path(), &format!("{folders}x.jpg"), "");
    assert_eq!(open(root.path()).len(), 1);
    put(root.path(), &format!("{folders}d/x.jpg"), "");
    let error = refusal(root.path());
    assert!(error.contains("more than 32 folders deep"), "{error}");
}

#[test]
fn a_folder_that_may_not_be_listed_is_refused() {
    let root = tempdir().unwrap();
    put(root.path(), "a/1.jpg", "");
    let folder = root.path().join("a");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o000)).unwrap();
    // A superuser may list everything.
    if fs::read_dir(&folder).is_err() {
        let error = refusal(root.path());
        assert!(
            error.contains("cannot be listed") && error.contains("make it readable"),
            "{error}"
        );
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
}

/// `count` records: label `i % 10`, and planes of `i`, `i + 1` and `i + 2`, the first pixel of each being 9.
fn batch(first: usize, count: usize) -> Vec<u8> {
    let record = |i: usize| {
        let mut record = vec![(i % 10) as u8];
        for channel in 0..3 {
            record.push(9);
            record.extend([(i + channel) as u8; 1023]);
        }
        record
    };
    (first..first + count).flat_map(record).collect()
}

#[test]
fn cifar_batches_are_joined_and_their_planes_interleaved() {
    let root = tempdir().unwrap();
    let folder = "cifar-10-batches-bin";
    put(root.path(), &format!("{folder}/data_batch_2.bin"), batch(50, 3));
    put(root.path(), &format!("{folder}/data_batch_4.bin"), batch(70, 2));
    put(root.path(), &format!("{folder}/test_batch.bin"), batch(0, 1));
    for path in [root.path().to_path_buf(), root.path().join(folder)] {
        let source = open(&path);
        assert_eq!(source.len(), 5);
        assert!(source.in_memory());
        assert_eq!(source.name(2), "data_batch_2.bin:2");
        assert_eq!(source.name(3), "data_batch_4.bin:0");
        assert_eq!(source.label(4), Some(1));
        assert_eq!(source.classes()[9], "9");
        let Image { height, width, pixels } = source.read(4).unwrap();
        assert_eq!((height, width, pixels.len()), (32, 32, 3072));
        assert_eq!(pixels[..6], [9, 9, 9, 71, 72, 73]);
        assert_eq!(pixels[3069..], [71, 72, 73]);
    }
}

#[test]
fn cifar_names_its_classes_and_takes_a_lone_test_batch() {
    let root = tempdir().unwrap();
    put(root.path(), "test_batch.bin", batch(0, 4));
    let classes = "airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n";
    put(root.path(), "batches.meta.txt", classes);
    let source = open(root.path());
    assert_eq!(source.name(3), "test_batch.bin:3");
    assert_eq!(source.classes()[source.label(3).unwrap()], "cat");
}

#[test]
fn damaged_cifar_batches_are_refused() {
    let root = tempdir().unwrap();
    put(root.path(), "data_batch_1.bin", &batch(0, 2)[1..]);
    let error = refusal(root.path());
    assert!(error.contains("has 6145 bytes, not a multiple of the 3073"), "{error}");
    put(root.path(), "data_batch_1.bin", "");
    assert!(refusal(root.path()).contains("has 0 bytes"));
    let mut other = batch(0, 2);
    other[3073] = 10;
    put(root.path(), "data_batch_1.bin", other);
    let error = refusal(root.path());
    assert!(error.contains("has label 10 in record 1"), "{error}");
}
