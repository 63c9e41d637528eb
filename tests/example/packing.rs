//! `pack_dataset`: the same shards whatever happens on the way, and nothing of anybody else's touched.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use pixmim::data::decode::Options;
use pixmim::data::resize::{Rect, resize, short_side};
use pixmim::data::source::Source;
use pixmim::train::config::Interpolation;
use tempfile::TempDir;

use crate::program::example;
use crate::{
    PHOTOS, Running, clean, fail, finish, folder, metrics_of, random, small, succeed, tree,
};

fn pack(folder: &TempDir, arguments: &str) -> Command {
    let mut command = clean(Command::new(example("pack_dataset")), folder.path());
    command.args(arguments.split_whitespace());
    command
}

/// `pack_dataset photos OUT`, to 13 small shards.
fn pack_photos(folder: &TempDir, arguments: &str) -> Command {
    pack(folder, &format!("{PHOTOS} --side 32 --images-per-shard 5 {arguments}"))
}

/// What a folder holds.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files.map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap())).collect()
}

/// A batch of CIFAR-10 with 23 records, one value for each of them.
fn cifar(folder: &Path) {
    let records = (0..23u8).flat_map(|i| std::iter::once(i % 10).chain((0..3072).map(move |_| i)));
    fs::write(folder.join("data_batch_1.bin"), records.collect::<Vec<_>>()).unwrap();
}

fn open(path: &Path) -> Source {
    Source::open(path, &Options::default()).unwrap()
}

#[test]
fn what_is_packed_trains_as_the_photos_do() {
    let folder = folder();
    let last = succeed(pack(&folder, &format!("{PHOTOS} packed --side 16")));
    assert!(last.starts_with("done images=64 bad=0 shards=1 images_per_s="), "{last}");
    assert!(last.ends_with("--data packed --set model.image_size=16"), "{last}");
    for data in [PHOTOS, "packed"] {
        let out = if data == PHOTOS { "photos" } else { "shards" };
        let switches = "--steps 5 --set log.picture_every=0 --set method.crop=simple";
        succeed(small(&folder, &format!("--data {data} --out {out} {switches}")));
    }
    let [photos, shards] = ["photos", "shards"].map(|run| metrics_of(&folder.path().join(run)));
    assert_eq!(photos.len(), 5);
    assert_eq!(photos, shards);
}

#[test]
fn shards_of_another_size_are_trained_on_with_a_warning() {
    let folder = folder();
    succeed(pack(&folder, &format!("{PHOTOS} packed --side 20")));
    let warned = |options: &str| {
        let options = format!("--data packed --dry-run --steps 1 --set method.crop={options}");
        let output = small(&folder, &options).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap().contains(
            "the shards were resized to 20 pixels, bicubic, and are resized again to 16 pixels",
        )
    };
    assert!(warned("simple"));
    assert!(!warned("random_resized"), "a random crop is resampled in any case");
}

#[test]
fn each_source_is_packed_to_the_loaders_own_resize() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("cifar")).unwrap();
    cifar(&at("cifar"));
    let mut tar = tar::Builder::new(fs::File::create(at("photos.tar")).unwrap());
    tar.append_dir_all("photos", Path::new(PHOTOS).join("animal")).unwrap();
    tar.finish().unwrap();
    let check = |data: &Path, out: &str, side: usize, interpolation, options: &str| {
        let data_text = data.display();
        succeed(pack(&folder, &format!("{data_text} {out} --side {side} {options}")));
        let (source, packed) = (open(data), open(&at(out)));
        assert_eq!(source.len(), packed.len());
        assert_eq!(source.classes(), packed.classes());
        for sample in 0..source.len() {
            let mut image = source.read(sample).unwrap();
            if side > 0 {
                let size = short_side(image.height, image.width, side);
                image = resize(&image, Rect::whole(&image), size, interpolation);
            }
            assert_eq!(packed.read(sample).unwrap(), image, "{out} {sample}");
            assert_eq!(packed.name(sample), source.name(sample));
            assert_eq!(packed.label(sample), source.label(sample));
        }
    };
    let (bicubic, bilinear) = (Interpolation::Bicubic, Interpolation::Bilinear);
    check(Path::new(PHOTOS), "a", 57, bicubic, "--images-per-shard 7");
    check(&at("cifar"), "b", 32, bicubic, "--images-per-shard 9");
    check(&at("photos.tar"), "c", 0, bicubic, "--images-per-shard 3");
    check(&at("c"), "d", 33, bilinear, "--interpolation bilinear");
    check(&at("a"), "e", 24, bicubic, "");
}

#[test]
fn threads_kills_and_signals_change_no_byte() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    succeed(pack_photos(&folder, "whole --threads 1"));
    let whole = content(&at("whole"));
    assert_eq!(whole.len(), 13);
    assert!(whole.contains_key("images-00012-of-00013.shard"));
    for threads in [2, 5] {
        succeed(pack_photos(&folder, &format!("t{threads} --threads {threads}")));
        assert!(content(&at(&format!("t{threads}"))) == whole, "{threads} threads");
    }

    let mut aside = 0;
    for (round, signal) in (0..).zip(["KILL", "KILL", "KILL", "INT", "TERM"]) {
        let out = format!("{signal}-{round}");
        let mut running = Running::start(pack_photos(&folder, &format!("{out} --threads 2")));
        running.wait_for("shard=1 ");
        sleep(Duration::from_micros(random(6, round, 15_000)));
        running.signal(signal);
        let (status, last, said) = running.end();
        let left = content(&at(&out));
        let tmp = left.keys().filter(|name| name.ends_with(".tmp")).count();
        if signal == "KILL" {
            assert_eq!(status.code(), None, "{said}");
            aside += usize::from(tmp > 0);
        } else {
            assert_eq!(status.code(), Some(0), "{said}");
            assert!(last.starts_with("stopped shards="), "{said}");
            assert_eq!(tmp, 0, "{said}");
        }
        // Whatever has its name is whole.
        for (name, bytes) in left.iter().filter(|(name, _)| name.ends_with(".shard")) {
            assert!(*bytes == whole[name], "{name}");
        }
        succeed(pack_photos(&folder, &out));
        assert!(content(&at(&out)) == whole, "{signal}");
    }
    println!("{aside} of 3 kills came while a shard was written");
    // Nothing is left to do, and nothing is done.
    let before = tree(&at("whole"));
    assert!(succeed(pack_photos(&folder, "whole")).starts_with("done images=64 "));
    assert_eq!(tree(&at("whole")), before);
}

#[test]
fn a_damaged_shard_is_named_and_packed_again_alone() {
    let folder = folder();
    succeed(pack_photos(&folder, "packed"));
    let whole = content(&folder.path().join("packed"));
    let verify = || pack(&folder, "--verify packed");
    let last = succeed(verify());
    assert!(last.starts_with("whole images=64 shards=13 "), "{last}");

    // In the pixels of one, the index of another.
    let at = |number: u32| folder.path().join(format!("packed/images-{number:05}-of-00013.shard"));
    let damage = |number: u32, place: usize| {
        let mut bytes = fs::read(at(number)).unwrap();
        let place = place.min(bytes.len() - 1);
        bytes[place] ^= 0x40;
        fs::write(at(number), bytes).unwrap();
    };
    damage(4, 5000);
    damage(7, usize::MAX);
    let (output, stdout, stderr) = finish(verify());
    assert_eq!(output.status.code(), Some(5), "{stdout}{stderr}");
    let named: Vec<_> = stdout.lines().filter(|line| line.starts_with("damaged ")).collect();
    assert_eq!(named.len(), 2, "{stdout}");
    assert!(named[0].contains("images-00004-of-00013.shard"), "{stdout}");
    assert!(named[1].contains("images-00007-of-00013.shard"), "{stdout}");
    assert!(stderr.contains("2 of its 13 shards"), "{stderr}");
    // Its index is all that is looked at again.
    let why = fail(pack_photos(&folder, "packed"), 5);
    assert!(why.contains("images-00007-of-00013.shard is damaged"), "{why}");

    fs::remove_file(at(4)).unwrap();
    fs::remove_file(at(7)).unwrap();
    let why = fail(small(&folder, "--data packed --steps 1"), 4);
    assert!(why.contains("lacks shard 4 of 13"), "{why}");
    let untouched = at(5).metadata().unwrap().modified().unwrap();
    succeed(pack_photos(&folder, "packed"));
    assert_eq!(at(5).metadata().unwrap().modified().unwrap(), untouched);
    assert!(content(&folder.path().join("packed")) == whole);
    let why = fail(pack(&folder, &format!("--verify {PHOTOS}")), 4);
    assert!(why.contains("holds no shard"), "{why}");
}

#[test]
fn photos_that_cannot_be_read_are_left_out_and_listed() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("photos")).unwrap();
    let photo = fs::read(Path::new(PHOTOS).join("nature/trakking_by_pitchanok.jpg")).unwrap();
    for i in 0..9 {
        let bytes = if i % 4 == 1 { &photo[..500] } else { &photo[..] };
        fs::write(at(&format!("photos/{i}.jpg")), bytes).unwrap();
    }
    let arguments = "photos packed --side 16 --images-per-shard 2";
    let why = fail(pack(&folder, arguments), 4);
    assert!(why.contains("more unreadable images than the 1 that --max-bad-share"), "{why}");
    assert!(why.contains("1.jpg (truncated JPEG), 5.jpg (truncated JPEG)"), "{why}");
    let lines = || fs::read_to_string(at("packed/bad_images.jsonl")).unwrap();
    assert_eq!(lines().lines().count(), 2);
    // Found again in the shards that are there, and counted.
    let why = fail(pack(&folder, arguments), 4);
    assert!(why.contains("1.jpg (truncated JPEG), 5.jpg (truncated JPEG)"), "{why}");

    let last = succeed(pack(&folder, &format!("{arguments} --max-bad-share 0.3")));
    assert!(last.starts_with("done images=7 bad=2 shards=5 "), "{last}");
    let line = r#"{"sample":5,"name":"5.jpg","reason":"truncated JPEG"}"#;
    assert_eq!(lines().lines().nth(1), Some(line));
    let packed = open(&at("packed"));
    let names: Vec<_> = (0..packed.len()).map(|i| packed.name(i)).collect();
    assert_eq!(names, ["0.jpg", "2.jpg", "3.jpg", "4.jpg", "6.jpg", "7.jpg", "8.jpg"]);
}

#[test]
fn a_place_that_is_taken_is_refused_and_left_as_it_is() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    succeed(pack_photos(&folder, "packed"));
    let before = tree(&at("packed"));
    let refused = |arguments: &str, says: &str| {
        let why = fail(pack(&folder, arguments), 1);
        assert!(why.contains(says), "{why}");
        assert_eq!(tree(&at("packed")), before);
    };
    let other = |options: &str| format!("{PHOTOS} packed {options}");
    refused(&other("--side 33 --images-per-shard 5"), "was packed with other options");
    refused(&other("--side 32 --images-per-shard 6"), "is not part of what is packed");
    refused(&other("--side 32 --images-per-shard 5 --interpolation bilinear"), "other options");
    fs::create_dir(at("cifar")).unwrap();
    cifar(&at("cifar"));
    refused("cifar packed --side 32 --images-per-shard 2", "is not part of what is packed");
    refused("packed packed --side 32 --images-per-shard 5", "holds other photos");
    for (arguments, says) in [
        (other("--side 20000"), "20000 is not in 0..=16384"),
        (other("--max-bad-share 1.5"), "within 0 to 1"),
        (other("--interpolation nearest"), "may be bicubic or bilinear"),
        ("--verify packed other".into(), "cannot be used with"),
        ("packed".into(), "<OUT>"),
    ] {
        let (output, _, stderr) = finish(pack(&folder, &arguments));
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("error[1]: ") && stderr.contains(says), "{stderr}");
    }
    assert_eq!(tree(&at("packed")), before);
    let why = fail(pack(&folder, "cifar cifar"), 1);
    assert!(why.contains("data_batch_1.bin is not part of what is packed"), "{why}");
    assert_eq!(fs::read_dir(at("cifar")).unwrap().count(), 1);

    // As another pack_dataset holds it.
    let lock = fs::File::open(at("packed")).unwrap();
    lock.try_lock().unwrap();
    refused(&other("--side 32 --images-per-shard 5"), "another pack_dataset writes there");
    drop(lock);

    let why = fail(pack(&folder, "nowhere packed"), 4);
    assert!(why.contains("nowhere: cannot be read"), "{why}");
    let why = fail(pack_photos(&folder, "small.toml/packed"), 5);
    assert!(why.contains("cannot create small.toml/packed: Not a directory"), "{why}");
}

/// A limit on the size of files cuts a write short, without any privilege.
#[test]
fn a_write_that_is_cut_short_ends_with_5_and_leaves_whole_shards_only() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("photos")).unwrap();
    let photo = Path::new(PHOTOS).join("nature/trakking_by_pitchanok.jpg");
    for i in 0..6 {
        fs::copy(&photo, at(&format!("photos/{i}.jpg"))).unwrap();
    }
    let pack_them = "photos packed --side 128 --images-per-shard 3";
    let script = r#"trap "" XFSZ; ulimit -f 100; exec "$@""#;
    let mut command = clean(Command::new("sh"), folder.path());
    command.args(["-c", script, "sh"]).arg(example("pack_dataset"));
    command.args(pack_them.split_whitespace());
    let why = fail(command, 5);
    assert!(why.starts_with("cannot write packed/images-00000-of-00002.shard"), "{why}");
    assert!(why.contains("File too large"), "{why}");
    assert_eq!(fs::read_dir(at("packed")).unwrap().count(), 0);
    assert!(succeed(pack(&folder, pack_them)).starts_with("done images=6 "));
}
