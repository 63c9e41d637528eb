//! Slices of cudarc's as tensors, on cudarc itself above the stand-in: a wait that is missing shows in the numbers.

use cudarc::driver::{CudaContext, DriverError};

use super::*;
use crate::cuda::Gpu;
use crate::{DType, Device};

#[test]
fn views_come_after_what_cudarc_enqueued_and_before_what_it_enqueues_next() {
    let test = "slices::views_come_after_what_cudarc_enqueued_and_before_what_it_enqueues_next";
    let Some(nvidia) = on_fake(test, &[]) else { return };
    let gpu = Gpu::new(Arc::new(nvidia));
    let context = CudaContext::new(0).unwrap();
    let theirs = context.new_stream().unwrap();
    // The slices' own stream, another one, and the default stream.
    let streams = [theirs.clone(), context.new_stream().unwrap(), context.default_stream()];
    for (round, stream) in streams.into_iter().enumerate() {
        let gpu = gpu.borrow(&stream).unwrap();
        let dev = Device::Cuda(gpu.clone());
        let data: Vec<f32> = (0..30).map(|i| (i + 100 * round) as f32).collect();
        let src = theirs.clone_htod(&data).unwrap();
        let mut dst = theirs.alloc_zeros::<f32>(40).unwrap();

        let from = gpu.view(src.slice(4..28), &[2, 3, 4]).unwrap();
        let mut into = gpu.view_mut(dst.slice_mut(8..32), &[2, 3, 4]).unwrap();
        assert_eq!((from.tensor().dtype(), from.tensor().place()), (DType::F32, dev.place()));
        dev.copy(into.tensor_mut(), from.tensor()).unwrap();
        assert_eq!(into.tensor().shape(), [2, 3, 4]);
        drop((from, into));

        let copied = theirs.clone_dtoh(&dst).unwrap();
        theirs.synchronize().unwrap();
        assert_eq!(copied[8..32], data[4..28], "round {round}");
        assert!(copied[..8].iter().chain(&copied[32..]).all(|x| *x == 0.0), "round {round}");

        // What cudarc writes next waits for the reads of a view, too.
        let from = gpu.view(src.as_view(), &[30]).unwrap();
        let mut into = gpu.view_mut(dst.slice_mut(..30), &[30]).unwrap();
        dev.copy(into.tensor_mut(), from.tensor()).unwrap();
        drop((from, into));
        let mut src = src;
        theirs.memset_zeros(&mut src).unwrap();
        theirs.synchronize().unwrap();
        let copied = theirs.clone_dtoh(&dst).unwrap();
        theirs.synchronize().unwrap();
        assert_eq!(copied[..30], data, "round {round}");
    }
}

#[test]
fn a_slice_that_does_not_fit_is_refused() {
    let test = "slices::a_slice_that_does_not_fit_is_refused";
    // The driver's context and cudarc's first one are the same, the next is another.
    let Some(nvidia) = on_fake(test, &[("FAKE_FIRST_CONTEXT", "2")]) else { return };
    let gpu = Gpu::new(Arc::new(nvidia));
    let [own, other] = [0, 1].map(|_| CudaContext::new(0).unwrap().new_stream().unwrap());
    let error = gpu.borrow(&other).unwrap_err().to_string();
    assert!(error.starts_with("`stream` is not of the primary context"), "{error}");

    let borrowed = gpu.borrow(&own).unwrap();
    let slice = own.alloc_zeros::<i32>(6).unwrap();
    let foreign = other.alloc_zeros::<i32>(6).unwrap();
    let refused = |result: Result<_>, words: &str| {
        let error = result.map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(borrowed.view(slice.as_view(), &[7]), "expected 6 elements in all");
    refused(borrowed.view(slice.as_view(), &[usize::MAX, 2, 3]), "expected 6 elements in all");
    refused(borrowed.view(slice.as_view(), &[1, 1, 1, 2, 3]), "at most four dimensions");
    refused(borrowed.view(foreign.as_view(), &[6]), "`slice` is not of the primary context");
    refused(gpu.view(slice.as_view(), &[6]), "Gpu::borrow");
    assert_ne!(borrowed.place(), gpu.place());
}

#[test]
fn an_error_that_cudarc_kept_to_itself_is_told() {
    let test = "slices::an_error_that_cudarc_kept_to_itself_is_told";
    let Some(nvidia) = on_fake(test, &[]) else { return };
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let gpu = Gpu::new(Arc::new(nvidia)).borrow(&stream).unwrap();
    let slice = stream.alloc_zeros::<u8>(6).unwrap();
    let error = DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    stream.context().record_err::<()>(Err(error));
    let error = gpu.view(slice.as_view(), &[6]).unwrap_err().to_string();
    assert!(error.contains("CUDA_ERROR_STREAM_CAPTURE_ISOLATION"), "{error}");
    stream.synchronize().unwrap();
}
