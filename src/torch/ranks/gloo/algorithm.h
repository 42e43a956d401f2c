// Declarations for c10d's header of its Gloo back end. LibTorch contains Gloo, but not its headers.
#pragma once
