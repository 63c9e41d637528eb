//! Images in `.tar` files.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use pixmim::data::decode::{Options, decode};
use pixmim::data::source::Source;
use tar::{Builder, EntryType, Header};
use tempfile::tempdir;

use crate::{fixture, fixture_path, mixed, write_png};

fn open(path: &Path) -> Source {
    Source::open(path, &Options::default()).unwrap()
}

fn refusal(path: &Path) -> String {
    let error = Source::open(path, &Options::default()).unwrap_err();
    assert_eq!(error.exit_code(), 4);
    error.to_string()
}

fn names(source: &Source) -> Vec<String> {
    (0..source.len()).map(|i| source.name(i)).collect()
}

/// A tar being written.
struct Making(Builder<File>);

impl Making {
    fn start(path: &Path) -> Self {
        Self(Builder::new(File::create(path).unwrap()))
    }

    fn put(&mut self, name: &str, content: impl AsRef<[u8]>) -> &mut Self {
        let mut header = Header::new_gnu();
        header.set_size(content.as_ref().len() as u64);
        self.0.append_data(&mut header, name, content.as_ref()).unwrap();
        self
    }

    fn link(&mut self, kind: EntryType, name: &str, to: &str) -> &mut Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        self.0.append_link(&mut header, name, to).unwrap();
        self
    }

    fn end(&mut self) {
        self.0.finish().unwrap();
    }
}

#[test]
fn members_are_the_samples_in_the_order_of_files_and_places() {
    let root = tempdir().unwrap();
    let (colour, grey) = (fixture("colour.jpg"), fixture("grey.png"));
    let mut making = Making::start(&root.path().join("b.tar"));
    making.put("0001.jpg", &colour).put("0001.cls", "7\n").put("0000.cls", " 2 ");
    making.put("0000.png", &grey).put("0002.json", "{}").put("0003.WebP", fixture("lossy.webp"));
    making.end();
    let mut making = Making::start(&root.path().join("a.tar"));
    making.put("x/y.jpg", &colour).end();
    let source = open(root.path());
    assert_eq!(
        names(&source),
        ["a.tar:x/y.jpg", "b.tar:0001.jpg", "b.tar:0000.png", "b.tar:0003.WebP"]
    );
    let labels: Vec<_> = (0..4).map(|i| source.label(i)).collect();
    assert_eq!(labels, [None, Some(7), Some(2), None]);
    assert_eq!(source.classes().len(), 8);
    assert_eq!(source.classes()[7], "7");
    assert!(!source.in_memory());
    for (sample, name) in [(0, "colour.jpg"), (1, "colour.jpg"), (2, "grey.png"), (3, "lossy.webp")]
    {
        let alone = decode(&fixture(name), &Options::default()).unwrap();
        assert_eq!(source.read(sample).unwrap(), alone, "{sample}");
    }

    let one = open(&root.path().join("b.tar"));
    assert_eq!(names(&one), names(&source)[1..]);
    assert_eq!(one.read(0).unwrap(), source.read(1).unwrap());
}

#[test]
fn long_names_pax_headers_links_folders_and_hidden_files_are_understood() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    let grey = fixture("grey.png");
    let long = format!("{}ü.png", "long/".repeat(60));
    let mut making = Making::start(&path);
    making.put(&long, &grey);
    making.link(EntryType::Symlink, "link.png", "x.png").link(EntryType::Link, "hard.png", &long);
    making.put("._hidden.png", "x").put(".cache/x.png", "x").put("empty.jpg", "");
    making.0.append_dir("folder.png", root.path()).unwrap();
    let pax = [("path", "by-pax/name.png".as_bytes()), ("mtime", b"1.5")];
    making.0.append_pax_extensions(pax).unwrap();
    making.put("ignored.txt", &grey);
    making.put("last.png", &grey).end();
    let source = open(&path);
    let long = format!("a.tar:{long}");
    assert_eq!(
        names(&source),
        [&long, "a.tar:empty.jpg", "a.tar:by-pax/name.png", "a.tar:last.png"]
    );
    for sample in [0, 2, 3] {
        assert_eq!(source.read(sample).unwrap().pixels, fixture("grey.png.rgb"), "{sample}");
    }
    assert_eq!(source.read(1).unwrap_err().reason, "not an image: the file is empty");
}

#[test]
fn keys_end_at_the_first_dot_and_labels_that_are_no_class_are_none() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    let mut making = Making::start(&path);
    making.put("v1.0/7.left.jpg", "").put("v1.0/7.right.jpg", "").put("v1.0/7.cls", "3");
    making.put("v1.jpg", "").put("v1.cls", "4000000000").put("n.jpg", "").put("n.cls", "cat");
    making.put("m.jpg", "").put("m.cls", [0xFF; 3]).put("k.jpg", "").put("k.cls", "1".repeat(99));
    making.end();
    let source = open(&path);
    let labels: Vec<_> = (0..source.len()).map(|i| source.label(i)).collect();
    assert_eq!(labels, [Some(3), Some(3), None, None, None, None]);
}

#[test]
fn a_tar_made_by_the_systems_program_gives_what_its_folder_gives() {
    let root = tempdir().unwrap();
    let photos = root.path().join("photos");
    for i in 0..7 {
        write_png(&photos.join(format!("class_{}/{i}.png", i % 2)), &mixed(i, 9 + i, 21 - i));
    }
    let made = std::process::Command::new("tar")
        .args(["--sort=name", "-cf", "photos.tar", "-C", "photos", "."])
        .current_dir(&root)
        .status();
    assert!(made.unwrap().success());
    let (folder, tar) = (open(&photos), open(&root.path().join("photos.tar")));
    assert_eq!(folder.len(), tar.len());
    for i in 0..folder.len() {
        assert_eq!(format!("photos.tar:./{}", folder.name(i)), tar.name(i));
        assert_eq!(folder.read(i), tar.read(i));
    }
}

#[test]
fn threads_that_read_at_once_do_not_disturb_each_other() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    let photo = root.path().join("photo.png");
    let mut making = Making::start(&path);
    for i in 0..12 {
        write_png(&photo, &mixed(i, 20 + i, 30));
        making.put(&format!("{i}.png"), fs::read(&photo).unwrap());
    }
    making.end();
    let source = Arc::new(open(&path));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let source = &source;
            scope.spawn(move || {
                for i in (0..120).map(|i| (i * (thread + 1) + thread) % 12) {
                    assert_eq!(source.read(i).unwrap(), mixed(i, 20 + i, 30));
                }
            });
        }
    });
}

#[test]
fn a_truncated_tar_is_refused_and_one_that_shrinks_later_has_bad_images() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    let colour = fixture("colour.jpg");
    let mut making = Making::start(&path);
    making.put("first.jpg", &colour).put("second.jpg", &colour).end();
    let whole = fs::read(&path).unwrap();
    let second = 1024 + colour.len().next_multiple_of(512);
    let source = open(&path);

    fs::write(&path, &whole[..second + colour.len() - 1]).unwrap();
    let why = refusal(&path);
    assert!(why.contains("truncated: it ends within its member second.jpg"), "{why}");
    assert!(source.read(0).is_ok());
    assert_eq!(source.read(1).unwrap_err().reason, "failed to fill whole buffer");
    // Within a header.
    fs::write(&path, &whole[..second - 100]).unwrap();
    assert!(refusal(&path).contains("a damaged one"));
    // Within the header's checksum.
    let mut bytes = whole.clone();
    bytes[150] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(refusal(&path).contains("is no .tar file, or a damaged one"));
}

#[test]
fn a_size_or_a_name_of_gigabytes_takes_no_memory() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    for kind in [EntryType::Regular, EntryType::GNULongName, EntryType::XHeader] {
        let mut header = Header::new_gnu();
        header.set_path("x.jpg").unwrap();
        header.set_entry_type(kind);
        header.set_size(1 << 40);
        header.set_cksum();
        let file = File::create(&path).unwrap();
        std::io::Write::write_all(&mut &file, header.as_bytes()).unwrap();
        // A file with a hole: it has the bytes, and takes no disk.
        let has_them = kind == EntryType::Regular;
        file.set_len(if has_them { 512 + (1 << 20) } else { 1 << 33 }).unwrap();
        let why = refusal(&path);
        let says = if has_them { "ends within its member" } else { "more than a megabyte" };
        assert!(why.contains(says), "{why}");
    }
}

#[test]
fn a_member_too_large_is_a_bad_image() {
    let root = tempdir().unwrap();
    let path = root.path().join("a.tar");
    Making::start(&path).put("x.jpg", [0; 2000]).end();
    let options = Options { max_file_bytes: 1000, ..Options::default() };
    let bad = Source::open(&path, &options).unwrap().read(0).unwrap_err();
    assert_eq!(bad.reason, "too large: 2000 bytes; data.max_file_mib allows 1000");
}

#[test]
fn compressed_archives_and_other_files_are_refused_with_the_cure() {
    let root = tempdir().unwrap();
    for (name, content) in [("a.tar.gz", "x"), ("a.tgz", "x"), ("a.tar.zst", "x"), ("a.zip", "x")] {
        let path = root.path().join(name);
        fs::write(&path, content).unwrap();
        let why = refusal(&path);
        assert!(why.contains("is a compressed archive") && why.contains("decompress it"), "{why}");
    }
    // A folder of nothing else.
    assert!(refusal(root.path()).contains("is a compressed archive"));
    // One that is named as if it were none.
    let path = root.path().join("a.tar");
    fs::write(&path, [0x1F, 0x8B, 8, 0]).unwrap();
    assert!(refusal(&path).contains("is compressed (gzip)"));
    fs::write(&path, "hello".repeat(300)).unwrap();
    assert!(refusal(&path).contains("is no .tar file"));
    Making::start(&path).put("notes.txt", "x").end();
    assert!(refusal(&path).contains("has no member that ends in .jpg"));
    let path = root.path().join("a.shard");
    fs::write(&path, "").unwrap();
    assert!(refusal(&path).contains("set data.path to the folder that holds all"));
}

#[test]
fn a_folder_that_is_two_things_is_refused() {
    let root = tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    Making::start(&at("a.tar")).put("x.jpg", "").end();
    // Archives of the system, hidden, or compressed are no data.
    for name in ["._a.tar", ".b.shard", "old.tar.gz", "bad_images.jsonl"] {
        fs::write(at(name), "").unwrap();
    }
    assert_eq!(names(&open(root.path())), ["a.tar:x.jpg"]);
    let with = |name: &str, content: &[u8], says: &str| {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), content).unwrap();
        let why = refusal(root.path());
        assert!(why.contains(says) && why.contains("a folder of its own"), "{why}");
        fs::remove_file(at(name)).unwrap();
    };
    with("b.shard", b"", "holds shards and .tar files");
    with("unpacked/x.jpg", b"", "holds .tar files and images");
    with("data_batch_1.bin", &[0; 3073], "holds CIFAR-10 batches and .tar files");
    fs::rename(at("a.tar"), at("c.txt")).unwrap();
    fs::copy(fixture_path("grey.png"), at("grey.png")).unwrap();
    with("b.shard", b"", "holds shards and images");
}
