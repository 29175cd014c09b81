import time, cProfile, pstats, runs, sys
import pytest
@pytest.mark.parametrize("i", range(8))
def test_p(i, tmp_path):
    t=time.time(); c=time.process_time()
    pr=cProfile.Profile(); pr.enable(); runs.output_of(tmp_path/f"a{i}",*(["--model.policy.critic=shared"] if i%2 else [])); pr.disable()
    w=time.time()-t; print(i,"wall",round(w,2),"cpu",round(time.process_time()-c,2), flush=True)
    if w>4: pstats.Stats(pr).sort_stats("tottime").print_stats(14); 
