//! Uploads from page-locked memory: read by the GPU itself, and not written before.

use super::*;

/// More than goes in one small copy.
const BYTES: usize = 300_007;

fn pinned(gpu: &Nvidia, bytes: usize) -> HostBuffer {
    HostBuffer::of(gpu.lock_pages(bytes).expect("pinned memory"))
}

fn counted(seed: usize) -> Vec<u8> {
    (0..BYTES).map(|i| (i / 5 * seed) as u8).collect()
}

#[test]
fn the_gpu_reads_the_buffer_itself_and_no_copy_of_it() {
    let test = "buffers::the_gpu_reads_the_buffer_itself_and_no_copy_of_it";
    // Pinned memory for the buffer, and none for a staging area of the same size in whole MiB.
    let Some(gpu) = on_fake(test, &[("FAKE_PINNED", "600000")]) else { return };
    for bytes in [1, 5000, BYTES] {
        let mut buffer = pinned(&gpu, bytes);
        assert!(buffer.iter().all(|byte| *byte == 0), "it holds zeros at first");
        buffer.fill(3);
        let memory = gpu.alloc(bytes, "test").unwrap();
        gpu.upload_buffer(memory, &buffer).unwrap();
        // The stand-in copies as late as it may: it must meet what is written behind the buffer's back.
        #[expect(unsafe_code, reason = "writes without waiting")]
        // SAFETY: the memory has `bytes` bytes, and no slice of it is alive.
        unsafe {
            buffer.memory().start().write_bytes(4, bytes);
        }
        assert_eq!(download(&gpu, memory, bytes), vec![4; bytes]);
        gpu.free(memory);
    }
}

#[test]
fn a_buffer_is_written_again_only_after_it_was_read() {
    let test = "buffers::a_buffer_is_written_again_only_after_it_was_read";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let [a, b, c] = [1, 2, 3].map(|_| gpu.alloc(BYTES, "test").unwrap());
    let mut buffer = pinned(&gpu, BYTES);
    buffer.copy_from_slice(&counted(7));
    gpu.upload_buffer(a, &buffer).unwrap();
    buffer.copy_from_slice(&counted(9));
    gpu.upload_buffer(b, &buffer).unwrap();
    // A small part, which is read by another stream than all of it was, and by a thread that has not seen the GPU before.
    let mut pieces = buffer.into_pieces(1000);
    gpu.upload_buffer(c, &pieces[1]).unwrap();
    std::thread::scope(|scope| scope.spawn(|| pieces[1].fill(1)).join().unwrap());
    let mut buffer = HostBuffer::join(pieces).unwrap();
    assert_eq!(download(&gpu, c, 1000), counted(9)[1000..2000]);
    buffer.fill(2);
    assert_eq!(download(&gpu, a, BYTES), counted(7));
    assert_eq!(download(&gpu, b, BYTES), counted(9));
    [a, b, c].into_iter().for_each(|memory| gpu.free(memory));
}

#[test]
fn uploads_of_a_buffer_keep_the_order_of_calls() {
    let test = "buffers::uploads_of_a_buffer_keep_the_order_of_calls";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let [memory, copy] = [1, 2].map(|_| gpu.alloc(BYTES, "test").unwrap());
    let mut buffers = [7, 9].map(|seed| (seed, pinned(&gpu, BYTES)));
    for (seed, buffer) in &mut buffers {
        buffer.copy_from_slice(&counted(*seed));
    }
    for _ in 0..3 {
        for (seed, buffer) in &buffers {
            gpu.upload_buffer(memory, buffer).unwrap();
            gpu.copy(copy, memory, BYTES).unwrap();
            gpu.upload(memory, &counted(5)).unwrap();
            assert_eq!(download(&gpu, copy, BYTES), counted(*seed));
            assert_eq!(download(&gpu, memory, BYTES), counted(5));
            fill(&gpu, memory, 2, 0).unwrap();
        }
    }
    [memory, copy].into_iter().for_each(|memory| gpu.free(memory));
}

#[test]
fn a_buffer_read_by_two_streams_waits_for_both() {
    let test = "buffers::a_buffer_read_by_two_streams_waits_for_both";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let stream = Stream::new().unwrap();
    let other = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let [a, b] = [1, 2].map(|_| gpu.alloc(BYTES, "test").unwrap());
    let mut buffer = pinned(&gpu, BYTES);
    buffer.copy_from_slice(&counted(7));
    gpu.upload_buffer(a, &buffer).unwrap();
    other.upload_buffer(b, &buffer).unwrap();
    buffer.fill(0);
    assert_eq!(download(&gpu, a, BYTES), counted(7));
    assert_eq!(download(&other, b, BYTES), counted(7));
    [a, b].into_iter().for_each(|memory| gpu.free(memory));
    drop(other);
}

#[test]
fn a_buffer_may_go_before_it_was_read_and_after_its_gpu() {
    let test = "buffers::a_buffer_may_go_before_it_was_read_and_after_its_gpu";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let memory = gpu.alloc(BYTES, "test").unwrap();
    let mut early = pinned(&gpu, BYTES);
    early.fill(6);
    gpu.upload_buffer(memory, &early).unwrap();
    // The stand-in ends the process if memory is freed that is still to be read, or if anything outlives the context.
    std::thread::scope(|scope| scope.spawn(move || drop(early)).join().unwrap());
    assert_eq!(download(&gpu, memory, BYTES), vec![6; BYTES]);
    let late = pinned(&gpu, BYTES).into_pieces(100_000);
    gpu.upload_buffer(memory, &late[0]).unwrap();
    gpu.free(memory);
    drop(gpu);
    assert_eq!(*late[3], [0; 7]);
}

#[test]
fn buffers_work_without_memory_to_spare_on_either_side() {
    // The destination and cublasLt's workspace leave less than a staging area.
    let most = ((32 << 20) + BYTES + 1000).to_string();
    let test = "buffers::buffers_work_without_memory_to_spare_on_either_side";
    let variables = [("FAKE_MEMORY", most.as_str()), ("FAKE_PINNED", "400000")];
    let Some(gpu) = on_fake(test, &variables) else { return };
    assert!(gpu.lock_pages(0).is_none());
    assert!(gpu.lock_pages(500_000).is_none());
    let memory = gpu.alloc(BYTES, "test").unwrap();
    let mut plain = HostBuffer::new(BYTES);
    for buffer in [&mut pinned(&gpu, BYTES), &mut plain] {
        for seed in [7, 9] {
            buffer.copy_from_slice(&counted(seed));
            gpu.upload_buffer(memory, buffer).unwrap();
            buffer.fill(0);
            assert_eq!(download(&gpu, memory, BYTES), counted(seed));
        }
    }
    gpu.free(memory);
}

#[test]
fn a_buffer_of_another_gpu_is_copied_on_the_host() {
    let test = "buffers::a_buffer_of_another_gpu_is_copied_on_the_host";
    let Some(gpu) = on_fake(test, &[("FAKE_FIRST_CONTEXT", "1")]) else { return };
    let other = Nvidia::start(&probe::find().unwrap(), 0, &[("fake", b"image")]).unwrap();
    let mut foreign = pinned(&other, BYTES);
    foreign.fill(8);
    let memory = gpu.alloc(BYTES, "test").unwrap();
    gpu.upload_buffer(memory, &foreign).unwrap();
    foreign.fill(0);
    assert_eq!(download(&gpu, memory, BYTES), vec![8; BYTES]);
    gpu.free(memory);
}

#[test]
fn an_upload_that_fails_leaves_nothing_behind() {
    let test = "buffers::an_upload_that_fails_leaves_nothing_behind";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let memory = gpu.alloc(BYTES, "test").unwrap();
    let mut buffer = pinned(&gpu, BYTES);
    gpu.begin_capture().unwrap();
    let error = gpu.upload_buffer(memory, &buffer).unwrap_err().to_string();
    assert!(error.contains("being recorded"), "{error}");
    gpu.end_capture().unwrap();
    gpu.upload_buffer(memory, &buffer).unwrap();
    gpu.synchronize().unwrap();

    let launch = Launch { kernel: "fail", grid: 1, block: 32, shared_bytes: 0, params: &[0; 8] };
    gpu.launch(&launch).unwrap();
    gpu.upload_buffer(memory, &buffer).unwrap();
    assert!(gpu.synchronize().is_err());
    let error = gpu.upload_buffer(memory, &buffer).unwrap_err().to_string();
    assert!(error.contains("fail"), "{error}");
    // Nobody reads it any more.
    buffer.fill(1);
    assert!(gpu.lock_pages(BYTES).is_none(), "ordinary memory is taken instead");
    gpu.free(memory);
}
