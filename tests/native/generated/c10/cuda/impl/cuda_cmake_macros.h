// The one header of torch's CUDA build that its smallest wheel, for macOS, lacks; the other headers are the same.
#pragma once
#define C10_CUDA_BUILD_SHARED_LIBS
