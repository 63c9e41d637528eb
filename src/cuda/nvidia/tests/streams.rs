//! Several streams of one GPU, and captures by others.

use std::ptr;

use super::*;

#[test]
fn a_borrowed_stream_is_used_and_left_to_its_owner() {
    let test = "streams::a_borrowed_stream_is_used_and_left_to_its_owner";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let stream = Stream::new().unwrap();
    let borrowed = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let memory = upload(&borrowed, &[3; 100_000]);
    fill(&borrowed, memory, 1, 7).unwrap();
    assert_eq!(download(&borrowed, memory, 8), [7, 0, 0, 0, 3, 3, 3, 3]);
    // Memory is the GPU's, whatever the stream.
    assert_eq!(download(&gpu, memory, 4), [7, 0, 0, 0]);
    borrowed.free(memory);
    // The stand-in ends the process if a stream is used after its end, or if one is left over.
    drop(stream);
    drop(borrowed);
    drop(gpu);
}

#[test]
fn work_of_one_stream_does_not_wait_for_that_of_another() {
    let test = "streams::work_of_one_stream_does_not_wait_for_that_of_another";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let stream = Stream::new().unwrap();
    let other = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let memory = upload(&gpu, &[1; 4]);
    gpu.synchronize().unwrap();
    fill(&gpu, memory, 1, 2).unwrap();
    assert_eq!(download(&other, memory, 4), [1; 4]);
    assert_eq!(download(&gpu, memory, 4), [2, 0, 0, 0]);
    gpu.free(memory);
    drop(other);
}

#[test]
fn streams_share_plans_and_have_workspaces_of_their_own() {
    let test = "streams::streams_share_plans_and_have_workspaces_of_their_own";
    let Some(gpu) = on_fake(test, &[("PIXMIM_MATMUL", "timed")]) else { return };
    let stream = Stream::new().unwrap();
    let other = gpu.on(Stream::borrow(stream.handle())).unwrap();
    // With bias, whose address is the product's and not the plan's.
    let case = Case { bias: true, ..CASE };
    let [first, second] = [0, 1].map(|_| product(&gpu, case));
    gpu.synchronize().unwrap();
    other.matmul(&first.matmul).unwrap();
    gpu.matmul(&second.matmul).unwrap();
    first.check(&other);
    second.check(&gpu);
    assert_eq!(algorithms(&gpu.plans()), [2], "planned once");
    assert_eq!(gpu.plans(), other.plans());
    assert_ne!(gpu.0.workspace().unwrap(), other.0.workspace().unwrap());
    for memory in first.memories.into_iter().chain(second.memories) {
        gpu.free(memory);
    }
    drop(other);
}

#[test]
fn what_is_enqueued_while_the_owner_captures_is_captured() {
    let test = "streams::what_is_enqueued_while_the_owner_captures_is_captured";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let stream = Stream::new().unwrap();
    let owner = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let [a, b, c] = [1, 2, 3].map(|byte| upload(&gpu, &[byte; 8]));
    let known = product(&gpu, CASE);
    gpu.matmul(&known.matmul).unwrap();
    gpu.synchronize().unwrap();
    gpu.clear(known.matmul.out.ptr, 4).unwrap();
    gpu.synchronize().unwrap();

    owner.begin_capture().unwrap();
    // As a C caller does: the stream is first seen while it is being captured, and needs a workspace.
    let ours = gpu.on(Stream::borrow(stream.handle())).unwrap();
    ours.copy(b, a, 8).unwrap();
    fill(&ours, a, 1, 7).unwrap();
    ours.clear(c, 4).unwrap();
    ours.matmul(&known.matmul).unwrap();
    let error = ours.matmul(&Matmul { m: 2, ..known.matmul }).unwrap_err().to_string();
    assert!(error.contains("call once before capturing"), "{error}");
    // Errors of the calls themselves do not end the capture either.
    assert!(fill(&ours, a, 1, 1).is_ok());
    let wrong = Launch { kernel: "fill", grid: 0, block: 32, shared_bytes: 0, params: &[0; 16] };
    assert!(ours.launch(&wrong).is_err());
    let graph = owner.end_capture().unwrap();

    assert_eq!(download(&gpu, b, 8), [2; 8], "a capture does not run");
    graph.replay().unwrap();
    owner.synchronize().unwrap();
    assert_eq!(download(&gpu, a, 8), [1, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(download(&gpu, b, 8), [1; 8]);
    assert_eq!(download(&gpu, c, 8), [0, 0, 0, 0, 3, 3, 3, 3]);
    known.check(&gpu);
    for memory in [a, b, c].into_iter().chain(known.memories) {
        gpu.free(memory);
    }
    drop((graph, owner, ours));
}

#[test]
fn a_product_that_fails_leaves_a_capture_as_it_was() {
    let test = "streams::a_product_that_fails_leaves_a_capture_as_it_was";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let problem = product(&gpu, CASE);
    gpu.matmul(&problem.matmul).unwrap();
    // A plan for the algorithm that passes every check and refuses to run.
    let mut plans = gpu.plans();
    let at = plans.len() - 80;
    plans[at] = 1;
    let found = probe::find().unwrap();
    let other = Nvidia::start(&found, 0, &[("fake", b"image")]).unwrap();
    other.load_plans(&plans).unwrap();
    assert!(other.matmul(&problem.matmul).is_err());

    let memory = upload(&other, &[1; 4]);
    other.begin_capture().unwrap();
    assert!(other.matmul(&problem.matmul).is_err());
    fill(&other, memory, 1, 5).unwrap();
    other.end_capture().unwrap().replay().unwrap();
    assert_eq!(download(&other, memory, 4), [5, 0, 0, 0]);
    for memory in problem.memories.into_iter().chain([memory]) {
        gpu.free(memory);
    }
}

#[test]
fn memory_given_back_while_the_owner_captures_can_be_had_again_afterwards() {
    let test = "streams::memory_given_back_while_the_owner_captures_can_be_had_again_afterwards";
    let most = ((32 << 20) + 1000).to_string();
    let Some(gpu) = on_fake(test, &[("FAKE_MEMORY", &most)]) else { return };
    let stream = Stream::new().unwrap();
    let owner = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let ours = gpu.on(Stream::borrow(stream.handle())).unwrap();
    let memory = ours.alloc(700, "test").unwrap();
    owner.begin_capture().unwrap();
    ours.free(memory);
    owner.end_capture().unwrap();
    assert!(gpu.alloc(700, "test").is_err(), "its stream has not been asked yet");
    let memory = ours.alloc(700, "test").unwrap();
    ours.free(memory);
    drop((owner, ours));
}

#[test]
fn the_legacy_default_stream_works_and_cannot_be_recorded() {
    let test = "streams::the_legacy_default_stream_works_and_cannot_be_recorded";
    let Some(gpu) = on_fake(test, &[]) else { return };
    let default = gpu.on(Stream::borrow(ptr::null_mut())).unwrap();
    let problem = product(&default, CASE);
    default.matmul(&problem.matmul).unwrap();
    problem.check(&default);
    let error = default.begin_capture().unwrap_err().to_string();
    assert!(error.contains("the legacy default stream cannot be recorded"), "{error}");
    default.clear(problem.matmul.out.ptr, 4).unwrap();
    assert_eq!(download(&default, problem.matmul.out.ptr, 4), [0; 4]);
    problem.memories.iter().for_each(|memory| default.free(*memory));
    drop(default);
}

#[test]
fn a_stream_of_another_context_is_refused() {
    let test = "streams::a_stream_of_another_context_is_refused";
    let Some(gpu) = on_fake(test, &[("FAKE_FIRST_CONTEXT", "1")]) else { return };
    let other = Nvidia::start(&probe::find().unwrap(), 0, &[("fake", b"image")]).unwrap();
    let error = gpu.on(Stream::borrow(other.0.stream.handle())).unwrap_err().to_string();
    assert_eq!(error, "`stream` is not of the primary context of this Fake GPU; make it there");
    assert!(gpu.on(Stream::borrow(gpu.0.stream.handle())).is_ok());
}
